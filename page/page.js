// The page: its sections, and which networks draw in them.

import { $, follow, onChoice } from "./common.js";
import { startArrows } from "./arrows.js";
import { startDrawing } from "./drawing.js";
import { startImages } from "./images.js";
import { startLearning } from "./learn.js";
import { included, open } from "./network.js";
import { startOpening } from "./opening.js";

const sections = {}; // the timeline of each
let own = null; // the network of the reader

/** Let a network draw in a section as soon as it is open, unless another one is wanted by then. */
async function select(name, key) {
  const section = sections[name];
  section.wanted = key;
  section.wait();
  try {
    const network = key === "own" ? own : await included(key);
    if (key === section.wanted) section.useNetwork(network);
  } catch (error) {
    if (key === section.wanted) section.fail(error);
  }
}

const tell = (textContent, className = "") =>
  Object.assign($("own-status"), { textContent, className });

/** Open the reader's network. One that cannot be opened changes nothing. */
async function openOwn(file) {
  tell(`Loading ${file.name} …`);
  const before = own;
  try {
    own = await open(file.name, new Uint8Array(await file.arrayBuffer()));
  } catch (error) {
    return tell(error.message, "error");
  }
  for (const button of document.querySelectorAll("[value=own]")) {
    button.textContent = file.name;
    button.click();
  }
  before?.close();
  tell(`${file.name} draws in sections 3 and 4. It runs on ${own.device}.`);
  $("images").scrollIntoView();
}

/** Start the sections. None waits for a file that only others need. */
async function begin() {
  window.sections = sections; // for the tests
  const arrows = startArrows(), learning = startLearning(), images = startImages();
  Object.assign(sections, { arrows, learning, images, drawing: startDrawing() });
  const load = (share) => share && !images.wanted && select("images", "clothes");
  follow($("images"), load, "100%"); // when it is less than a screen away
  const recording = await $("recording").decode().then(() => $("recording"), () => null);
  const opening = sections.opening = startOpening(recording), { drawing } = sections;
  included("emoji").then(opening.useNetwork, opening.fail);
  if (drawing.wanted) return; // the reader's network is already there
  if (recording) drawing.trace(recording);
  await select("drawing", "emoji");
}

const [, owner] = location.hostname.match(/^(.+)\.github\.io$/) ?? [];
if (owner) $("code").href = `https://github.com/${owner}/${location.pathname.split("/")[1]}`;
$("unloaded").hidden = true;
for (const name of ["images", "drawing"]) onChoice(`${name}-networks`, (key) => select(name, key));
$("model").onchange = ({ target }) => {
  const [file] = target.files;
  if (file) openOwn(file);
  target.value = "";
};
window.ready = begin();
