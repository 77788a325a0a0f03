// The page: its sections, and which network draws in section 3. In section 4, the network of the
// emoji draws, or the reader's.

import { $, announce, follow, pause } from "./common.js";
import { startArrows } from "./arrows.js";
import * as drawing from "./drawing.js";
import * as images from "./images.js";
import { startLearning } from "./learn.js";
import { included, open } from "./networks.js";
import { startOpening } from "./opening.js";

// On GitHub Pages, the repository's address is known.
const [, owner] = location.hostname.match(/^(.+)\.github\.io$/) ?? [];
if (owner) $("code").href = `https://github.com/${owner}/${location.pathname.split("/")[1]}`;
$("unloaded").hidden = true;

const KEYS = ["clothes", "emoji", "own"]; // of the buttons
let wanted = "clothes"; // the network that shall draw
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
  select("own");
  drawing.useNetwork(own);
  before?.close();
  tell(`${file.name} draws in sections 3 and 4. It runs on ${own.device}.`);
  $("images").scrollIntoView();
}

for (const key of KEYS) $(`use-${key}`).onclick = () => select(key);
$("model").onchange = ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (file) openOwn(file);
};

// On a phone, the slider stays in sight as long as its section is.
for (const part of document.querySelectorAll(".part")) {
  follow(part.querySelector(".stage"), (share) => part.classList.toggle("seen", share >= 0.4));
}

/** Start the sections, one at a time, so that the opening can move, and then open the networks. */
async function begin() {
  const sections = { opening: await startOpening() }, { startImages } = images;
  const starts = { arrows: startArrows, learn: startLearning, images: startImages };
  for (const [name, start] of Object.entries({ ...starts, drawing: drawing.startDrawing })) {
    await pause(0);
    sections[name] = start();
  }
  window.sections = sections; // the timelines, for docs/record_page.py and the tests
  await included("emoji").then((network) => own ?? drawing.useNetwork(network), drawing.fail);
  await select("clothes");
}

window.ready = begin();
