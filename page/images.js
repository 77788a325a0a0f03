// Section 3: images. The gesture of the opening with a grid of pictures, under a curtain.

import { $, LOADING, captions, follow, onChoice } from "./common.js";
import { included } from "./network.js";
import { Passage } from "./passage.js";
import { drawImages, readRow } from "./plane.js";
import { exactEps } from "./points.js";
import { ABAR, guided, noiseOf, predictX0 } from "./sampler.js";
import { Gesture } from "./timeline.js";

const COLUMNS = 5, COUNT = 15; // of the pictures
const WORDS = { none: null, weak: 0, strong: 3 }; // the guidance of each choice; null: no word
const curtain = $("images-curtain"), show = captions("images");
let gesture, network = null, word = "weak";
let wanted = null; // the key of what is to draw: "clothes", "emoji" or "exact"
let guess = {}; // of the network at a place of the slider: {x0, place, isAsked}
const pictures = new Passage(null, { steps: 10 });

/** Let a network draw as soon as it is open, unless another one is wanted by then. */
async function select(key) {
  wanted = key;
  $("images-pills").hidden = key !== "emoji";
  $("images-real").hidden = key !== "exact";
  wait();
  try {
    const opened = await (key === "exact" ? exact() : included(key));
    if (key === wanted) useNetwork(opened);
  } catch (error) {
    if (key === wanted) gesture.fail(error);
  }
}

/** The exact arrows of the photographs in real.webp, as a network. */
async function exact() {
  const shown = $("real"), shape = [1, 32, 32], count = 12;
  await shown.decode();
  const photographs = readRow(shown, count).filter((_, k) => k % 3072 < 1024); // grey
  drawImages($("images-real"), photographs, shape, count, 1);
  const eps = async (x, t) => exactEps(x, ABAR[t], photographs, 1024, 0);
  return { shape, eps, isExact: true };
}

/** Begin with noise, which can be sent back before the network is there. */
function wait() {
  [network, gesture.fault, guess] = [null, "", {}];
  pictures.use(null);
  pictures.begin(null, noiseOf(0, COUNT, 1024));
  gesture.stop();
  gesture.moveTo(1);
  gesture.hold(3000, () => gesture.comeBack(), 0.7);
}

/** Let a network draw. Each row of the emoji has a class; other networks draw without one. */
function useNetwork(opened) {
  network = opened;
  const { shape, kinds } = network, w = kinds ? WORDS[word] : null;
  const y = Array.from({ length: COUNT }, (_, k) => kinds?.[Math.floor(k / COLUMNS)]);
  pictures.noise = noiseOf(0, COUNT, shape[0] * shape[1] * shape[2]);
  pictures.use(w === null ? opened.eps : guided(opened, y, w));
  gesture.render();
}

/** Ask what the network guesses at the place of the slider, one question at a time. */
async function ask() {
  const { place, isBack } = gesture, own = guess;
  if (isBack || !place || !pictures.eps || own.isAsked || own.place === place) return;
  own.isAsked = true;
  const { x, level } = pictures.at(place), t = Math.max(0, Math.round(level));
  const eps = await pictures.eps(x, t).catch((error) => gesture.fail(error));
  const x0 = eps ? predictX0(x, eps, ABAR[t], 1) : null;
  Object.assign(own, { x0, place, isAsked: false });
  gesture.render(); // and ask again, if the slider has moved
}

function say() {
  const { place, isBack, hasCome, fault } = gesture;
  if (fault || !network) return show("missing", { text: fault || LOADING });
  const last = network.kinds ? word : network.isExact ? "exact" : "done";
  if (hasCome || (!place && !isBack)) return show(last);
  const { length } = isBack ? pictures.levels : [];
  if (isBack) return show("back", { steps: length > 1 ? `${length} steps` : "one step" });
  return show(place < 1 ? "noising" : "noise");
}

function draw() {
  const { place, isBack } = gesture, { x, x0 } = pictures.at(place);
  const shape = network?.shape ?? [1, 32, 32];
  if (isBack || !place) guess = {};
  curtain.parentElement.style.setProperty("--curtain", `${curtain.value}%`);
  drawImages($("images-noisy"), x, shape, COLUMNS, 1);
  drawImages($("images-expected"), (!isBack && guess.x0) || x0, shape, COLUMNS, 1);
  ask();
}

/** Make the section work. Returns its timeline. */
export function startImages() {
  gesture = new Gesture("images", [pictures], { draw, say });
  wait();
  follow($("images"), (share) => share && !wanted && select("clothes"), "100%"); // it comes near
  $("images").addEventListener("click", ({ target }) => { // only what is in sight moves
    if (target.matches("button")) gesture.stage.scrollIntoView({ block: "nearest" });
  });
  onChoice("images-networks", select);
  curtain.oninput = () => gesture.render();
  onChoice("images-pills", (value) => { word = value; select(wanted); }); // it begins again
  return gesture;
}
