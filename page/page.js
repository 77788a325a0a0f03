// The page starts its sections. None waits for a file that only others need.

import { $ } from "./common.js";
import { startArrows } from "./arrows.js";
import { startDrawing } from "./drawing.js";
import { startImages } from "./images.js";
import { startLearning } from "./learn.js";
import { included } from "./network.js";
import { startOpening } from "./opening.js";

/** The reader has done something. */
const used = new Promise((resolve) => {
  const once = { once: true, passive: true };
  for (const event of ["scroll", "pointerdown", "keydown"]) addEventListener(event, resolve, once);
});

async function begin() {
  const sections = window.sections = {}; // the timeline of each, for the tests
  sections.arrows = startArrows();
  sections.learning = startLearning();
  sections.images = startImages();
  const recording = await $("recording").decode().then(() => $("recording"), () => null);
  sections.opening = startOpening(recording);
  sections.drawing = startDrawing(recording);
  const start = (its) => included("emoji").then(its.useNetwork, (error) => its.fail(error));
  await used; // before, the recording is enough
  await Promise.all([sections.opening, sections.drawing].map(start));
}

const [, owner] = location.hostname.match(/^(.+)\.github\.io$/) ?? [];
if (owner) {
  const code = `https://github.com/${owner}/${location.pathname.split("/")[1]}`;
  for (const link of document.querySelectorAll("[href^='../']")) {
    link.href = link.getAttribute("href").replace("..", `${code}/blob/HEAD`);
  }
}
$("unloaded").hidden = true;
window.ready = begin();
