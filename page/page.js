// The page: its sections, and which network draws in section 3. In section 5, the network of the emoji draws, or the
// reader's.

import { $, announce, follow, pause } from "./common.js";
import { startArrows } from "./arrows.js";
import * as drawing from "./drawing.js";
import { startGuidance } from "./guidance.js";
import * as images from "./images.js";
import { startLearning } from "./learn.js";
import { included, open } from "./networks.js";
import { startOpening } from "./opening.js";

// A link to the repository works only on GitHub Pages, where the repository's address is known.
const [, owner] = location.hostname.match(/^(.+)\.github\.io$/) ?? [];
if (owner) {
  $("code").hidden = false;
  const repository = $("code").firstElementChild.href = `https://github.com/${owner}/${location.pathname.split("/")[1]}`;
  for (const link of document.querySelectorAll("[data-lesson]")) {
    link.href = `${repository}/blob/HEAD/docs/lesson.md#${link.dataset.lesson}`;
  }
}

let wanted = "clothes"; // the network that shall draw: a key of the buttons
let own = null; // the reader's

/** What the form of the last part says. */
function settings() {
  const { sampler, steps, seed } = Object.fromEntries(new FormData($("settings")));
  return { sampler, steps: Number(steps), seed: Number(seed) };
}

/** Let a network draw as soon as it is open, if no other one is wanted by then. */
async function select(key) {
  wanted = key;
  for (const name of ["clothes", "emoji", "own"]) $(`use-${name}`).ariaPressed = String(name === key);
  if (key !== "own") images.awaitNetwork(key);
  try {
    const network = key === "own" ? own : await included(key);
    if (key !== wanted) return;
    images.useNetwork(network, settings());
    if (key === "own") drawing.useNetwork(network);
  } catch (error) {
    if (key === wanted) images.fail(error);
  }
}

/** Open the reader's network. One that cannot be opened changes nothing. */
async function openOwn(file) {
  const tell = (text, isError = false) => {
    $("own-status").textContent = text;
    $("own-status").classList.toggle("error", isError);
    announce(text);
  };
  tell(`Loading ${file.name} …`);
  let opened;
  try {
    opened = await open(file.name, new Uint8Array(await file.arrayBuffer()));
  } catch (error) {
    return tell(error.message, true);
  }
  const before = own;
  own = opened;
  $("use-own").textContent = file.name;
  $("use-own").hidden = false;
  await select("own");
  before?.close();
  tell(`${file.name} draws in sections 3 and 5. It runs on ${own.device}.`);
  $("images").scrollIntoView();
}

for (const key of ["clothes", "emoji", "own"]) $(`use-${key}`).onclick = () => select(key);
$("model").onchange = ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (file) openOwn(file);
};
$("settings").onsubmit = (event) => {
  event.preventDefault();
  images.useSettings(settings());
  $("images").scrollIntoView();
};

// On a phone, the slider stays in sight as long as its section is.
for (const part of document.querySelectorAll(".part")) {
  follow(part.querySelector(".stage"), (isSeen) => part.classList.toggle("seen", isSeen), 0.4);
}

/** Start the sections, one at a time, so that the opening can move; then open the first network. */
async function begin() {
  for (const start of [startArrows, startLearning, images.startImages, startGuidance, drawing.startDrawing]) {
    await pause(0);
    start();
  }
  await included("emoji").catch(() => {}); // for the opening, which says its errors
  await select("clothes");
}

window.recorded = startOpening();
window.ready = begin();
