// The page: its sections, and which networks draw in them.

import { $, announce, follow } from "./common.js";
import { startArrows } from "./arrows.js";
import * as drawing from "./drawing.js";
import * as images from "./images.js";
import { startLearning } from "./learn.js";
import { included, open } from "./network.js";
import * as opening from "./opening.js";

let own = null; // the network of the reader

/** Returns select(key), which lets a network draw in a section as soon as it is open, if no other
 * one has been selected there by then. The values of the section's buttons are keys. */
function chooser(name, section) {
  const buttons = [...$(`${name}-networks`).children];
  let wanted;
  const select = async (key) => {
    wanted = key;
    for (const button of buttons) button.ariaPressed = String(button.value === key);
    section.wait(key);
    try {
      const network = await (key === "own" ? own : included(key));
      if (key === wanted) section.useNetwork(network);
    } catch (error) {
      if (key === wanted) section.fail(error);
    }
  };
  for (const button of buttons) button.onclick = () => select(button.value);
  return select;
}

const inImages = chooser("images", images), inDrawing = chooser("drawing", drawing);

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
  for (const button of document.querySelectorAll("[value=own]")) button.textContent = file.name;
  for (const button of document.querySelectorAll("button[hidden]")) button.hidden = false;
  for (const select of [inImages, inDrawing]) select("own");
  before?.close();
  tell(`${file.name} draws in sections 3 and 4. It runs on ${own.device}.`);
  $("images").scrollIntoView();
}

/** Load the network of the clothes when section 3 is less than a screen away. */
function loadWhenNear() {
  const near = new IntersectionObserver(([{ isIntersecting }]) => {
    if (!isIntersecting) return;
    near.disconnect();
    if (!own) inImages("clothes");
  }, { rootMargin: "100%" });
  near.observe($("images"));
}

/** Start the sections. None waits for a file that another one needs. */
async function begin() {
  const sections = {
    arrows: startArrows(), learning: startLearning(), images: images.startImages(),
  };
  loadWhenNear();
  const recording = await $("recording").decode().then(() => $("recording"), () => null);
  Object.assign(sections, {
    opening: opening.startOpening(recording), drawing: drawing.startDrawing(recording),
  });
  window.sections = sections; // their timelines, for docs/record_page.py and the tests
  included("emoji").then(opening.useNetwork, opening.fail);
  await inDrawing("emoji");
}

const [, owner] = location.hostname.match(/^(.+)\.github\.io$/) ?? [];
if (owner) $("code").href = `https://github.com/${owner}/${location.pathname.split("/")[1]}`;
$("unloaded").hidden = true;
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
