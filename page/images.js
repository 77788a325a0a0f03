// Section 3: images. A curtain divides the noisy pictures from the guess, or two ways back.

import { $, LOADING, captions, follow, onChoice, onPointer } from "./common.js";
import { included } from "./network.js";
import { Passage } from "./passage.js";
import { drawImages, readRow } from "./plane.js";
import { ABAR, epsFrom, guided, noiseOf, predictX0 } from "./sampler.js";
import { Gesture } from "./timeline.js";

const COLUMNS = 5, COUNT = 15; // of the pictures
const WORDS = { none: null, weak: 0, strong: 3 }; // the guidance of each choice; null: no word
const curtain = $("images-curtain"), show = captions("images");
let gesture, network = null, word = "weak";
let wanted = null; // the key of what is to draw: "clothes", "emoji" or "exact"
let guess = {}; // of the network at a place of the slider: {x0, place, isAsked}
const pictures = new Passage(null, { steps: 10 });
const compared = new Passage(null, { steps: 10 }); // right of the curtain, beside exact arrows

/** Let a network draw as soon as it is open, unless another one is wanted by then. */
async function select(key) {
  wanted = key;
  if (key === "exact") curtain.value = 50;
  $("images-pills").hidden = key !== "emoji";
  wait();
  try {
    const opened = await (key === "exact" ? exact() : included(key));
    if (key === wanted) useNetwork(opened);
  } catch (error) {
    if (key === wanted) gesture.fail(error);
  }
}

/** The exact arrows of all 60,000 photographs from the first noise, to be compared with the network
 * that learnt from these. exact.webp has their estimates, a row for each step (docs/copies.py). */
async function exact() {
  const { eps: compared, shape } = await included("clothes"), recording = $("exact");
  await recording.decode();
  const eps = (x, t) => { // grey
    const row = readRow(recording, COUNT, pictures.levels.indexOf(t));
    return epsFrom(x, row.filter((_, k) => k % 3072 < 1024), t);
  };
  return { shape, eps, compared };
}

/** Begin with noise, which can be sent back before the network is there. */
function wait() {
  [network, gesture.fault, guess] = [null, "", {}];
  for (const passage of [pictures, compared]) {
    passage.use(null);
    passage.begin(null, noiseOf(0, COUNT, 1024));
  }
  gesture.isFixed = wanted === "exact"; // there is one recording
  gesture.passages = gesture.isFixed ? [pictures, compared] : [pictures];
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
  if (opened.compared) compared.use(opened.compared);
  gesture.render();
}

/** Ask what the network guesses at the place of the slider, one question at a time. */
async function ask() {
  const { place, isBack, isFixed } = gesture, own = guess;
  if (isFixed || isBack || !place || !pictures.eps || own.isAsked || own.place === place) return;
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
  if (wanted === "exact") return show("exact");
  if (hasCome || (!place && !isBack)) return show(network.kinds ? word : "done");
  const { length } = isBack ? pictures.levels : [];
  return show(isBack ? "back" : "noising", { steps: length > 1 ? `${length} steps` : "one step" });
}

function draw() {
  const { place } = gesture, { x, x0 } = pictures.at(place);
  const shape = network?.shape ?? [1, 32, 32];
  if (pictures.steps?.length || !place) guess = {}; // until the first step back, it is shown
  curtain.parentElement.style.setProperty("--curtain", `${curtain.value}%`);
  drawImages($("images-noisy"), x, shape, COLUMNS, 1);
  const right = wanted === "exact" ? compared.at(place).x : guess.x0 ?? x0;
  drawImages($("images-expected"), right, shape, COLUMNS, 1);
  ask();
}

/** Make the section work. Returns its timeline. */
export function startImages() {
  gesture = new Gesture("images", [pictures, compared], { draw, say });
  wait();
  follow($("images"), (share) => share && !wanted && select("clothes"), "100%"); // it comes near
  $("images").addEventListener("click", ({ target }) => { // only what is in sight moves
    if (target.matches("button")) gesture.stage.scrollIntoView({ block: "nearest" });
  });
  onChoice("images-networks", select);
  const move = ({ offsetX }) => {
    curtain.value = (100 * offsetX) / curtain.clientWidth;
    gesture.render();
  };
  onPointer(curtain.parentElement, { press: move, drag: move, release() {} });
  curtain.oninput = () => gesture.render(); // by a key
  onChoice("images-pills", (value) => { word = value; select(wanted); }); // it begins again
  return gesture;
}
