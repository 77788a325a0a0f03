// The page: its sections, and which networks draw in sections 3 and 4.

import { $, announce, follow } from "./common.js";
import { startArrows } from "./arrows.js";
import * as drawing from "./drawing.js";
import * as images from "./images.js";
import { startLearning } from "./learn.js";
import { included, open } from "./network.js";
import { startOpening } from "./opening.js";

const KEYS = ["clothes", "emoji", "own"]; // of the buttons of section 3
let wanted = null; // the network that shall draw there
let own = null; // the reader's

/** Let a network draw as soon as it is open, if no other one is wanted by then. */
async function select(key) {
  wanted = key;
  for (const name of KEYS) $(`use-${name}`).ariaPressed = String(name === key);
  if (key !== "own") images.tell("wait", key);
  try {
    const network = key === "own" ? own : await included(key);
    if (key === wanted) images.useNetwork(network);
  } catch (error) {
    if (key === wanted) images.tell("fault", error.message);
  }
}

function tell(text, isError = false) {
  $("own-status").textContent = text;
  $("own-status").classList.toggle("error", isError);
  announce(text);
}

/** Open the reader's network. One that cannot be opened changes nothing. */
async function openOwn(file) {
  tell(`Loading ${file.name} …`);
  const before = own;
  try {
    own = await open(file.name, new Uint8Array(await file.arrayBuffer()));
  } catch (error) {
    return tell(error.message, true);
  }
  $("use-own").textContent = file.name;
  $("use-own").hidden = false;
  select("own");
  drawing.useNetwork(own);
  before?.close();
  tell(`${file.name} draws in sections 3 and 4. It runs on ${own.device}.`);
  $("images").scrollIntoView();
}

/** Start the sections, and then open the networks. */
async function begin() {
  window.sections = { // their timelines, for docs/record_page.py and the tests
    opening: await startOpening(), arrows: startArrows(), learning: startLearning(),
    images: images.startImages(), drawing: drawing.startDrawing(),
  };
  const emoji = included("emoji").then((network) => own ?? drawing.useNetwork(network));
  await emoji.catch(() => { $("drawing").hidden = true; }); // section 3 says what is wrong
  if (!wanted) await select("clothes"); // the reader may have been faster
}

const [, owner] = location.hostname.match(/^(.+)\.github\.io$/) ?? [];
if (owner) $("code").href = `https://github.com/${owner}/${location.pathname.split("/")[1]}`;
$("unloaded").hidden = true;
for (const key of KEYS) $(`use-${key}`).onclick = () => select(key);
$("model").onchange = ({ target }) => {
  const [file] = target.files;
  if (file) openOwn(file);
  target.value = "";
};
// On a phone, the slider stays in sight as long as its section is.
for (const part of document.querySelectorAll(".part")) {
  follow(part.querySelector(".stage"), (share) => part.classList.toggle("seen", share >= 0.4));
}
window.ready = begin();
