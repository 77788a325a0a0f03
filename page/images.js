// Section 3: images. The gesture of the opening with a grid of pictures, under a curtain.

import { $, captions, still } from "./common.js";
import { Passage } from "./passage.js";
import { drawImages } from "./plane.js";
import { guided, noiseOf } from "./sampler.js";
import { Gesture } from "./timeline.js";

const COLUMNS = 5, COUNT = 15; // of the pictures
const WORDS = { none: null, weak: 0, strong: 3 }; // the guidance of each choice; null: no word
const curtain = $("images-curtain"), show = captions("images");
let gesture, network = null, word = "strong";
let notice = ["wait", "clothes"]; // the key of a caption, and its text
const pictures = new Passage(null, { steps: 10, scales: true }, (error) => {
  if (error) tell("fault", error.message);
  gesture.render();
});

/** Say that a network is loading, or why there is none. */
export function tell(key, text) {
  notice = [key, text];
  say();
}

/** Begin with noise. The classes take turns; each row of the emoji has one. */
export function useNetwork(opened) {
  network = opened;
  const { size, betas, classes, kinds } = network, w = kinds ? WORDS[word] : 0;
  const classOf = (k) => (kinds ? kinds[Math.floor(k / COLUMNS)] : k % classes.length);
  const y = classes.length ? Array.from({ length: COUNT }, (_, k) => classOf(k)) : undefined;
  $("images-pills").hidden = !kinds;
  pictures.use(w === null ? (x, t) => opened.eps(x, t) : guided(opened, y, w), { betas });
  pictures.begin(null, noiseOf(0, COUNT, size));
  notice = null;
  gesture.stop();
  gesture.moveTo(1);
  gesture.whenSeen(() => {
    gesture.sendBack();
    if (still) gesture.place = 0;
  });
}

function say() {
  const { place, isBack, hasCome } = gesture;
  if (notice) return show(notice[0], { text: notice[1] });
  if (hasCome || (!place && !isBack)) return show(network.kinds ? word : "done");
  if (isBack) return show("back", { steps: pictures.levels.length });
  return show(place < 1 ? "noising" : "noise");
}

function draw() {
  const { place, isBack } = gesture, { x, x0 } = pictures.at(place);
  const shape = network?.shape ?? [1, 32, 32];
  const open = isBack || !place ? curtain.value : 100; // on the way to the noise, nothing guesses
  curtain.parentElement.style.setProperty("--curtain", `${open}%`);
  drawImages($("images-noisy"), x, shape, COLUMNS, 1);
  drawImages($("images-expected"), x0, shape, COLUMNS, 1);
}

/** Make the section work. Returns its timeline. */
export function startImages() {
  pictures.begin(null, noiseOf(0, COUNT, 1024));
  gesture = new Gesture("images", [pictures], draw, say);
  const letGo = gesture.letGo.bind(gesture);
  gesture.letGo = () => network && letGo();
  gesture.moveTo(1);
  curtain.oninput = () => gesture.render();
  for (const key of Object.keys(WORDS)) {
    $(`word-${key}`).onclick = () => {
      word = key;
      for (const it of Object.keys(WORDS)) $(`word-${it}`).ariaPressed = String(it === key);
      useNetwork(network);
    };
  }
  return gesture;
}
