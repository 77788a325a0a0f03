// Section 3: images. The gesture of the opening with a grid of pictures, under a curtain.

import { $, Owner, follow, pause, still } from "./common.js";
import { Gesture } from "./gesture.js";
import { Passage } from "./passage.js";
import { drawImages } from "./plane.js";
import { guided, noiseOf, predictX0, sampleProgressive } from "./sampler.js";

const COLUMNS = 4, COUNT = COLUMNS ** 2, FILM = 8; // FILM: steps of a picture that are shown
const STRIP = [0, 1, 2, 4, 6], EACH = 4; // the guidance of the strip, and its pictures at each
const KINDS = { "fashion-mnist.onnx": "boot", "emoji.onnx": "smileys" }; // of the strip
const ABOUT = { "fashion-mnist.onnx": "This network has learnt from 60,000 pictures of clothes.", "emoji.onnx": "This network has learnt from 3,743 emoji." };
const DISTANCES = [2.6, 13.7, 25.3, 38.8, 45.7]; // of the clothes with this guidance, by benchmarks/ladder.py

const state = { chosen: 0, seed: 0, fault: "", sweeps: false, isSeen: false, isStripSeen: false, isStripDrawn: false };
let network = null;
export let expected; // {x0, place, asked}: what the network expects on the way to the noise
const strip = new Owner();
export const pictures = new Passage(null, { sampler: "sa-solver", steps: 10 }, (error) => {
  if (error) fail(error);
  gesture.render();
});
export let gesture;

/** An epsModel of pictures of these kinds, with guidance w. */
const modelOf = (of, y, w) => of.classes.length ? guided(of, y, w) : (x, t) => of.eps(x, t);

// ---- what changes it

export function fail(error) {
  state.fault = error.message.split("\n")[0];
  say();
}

/** Begin with noise, which no pictures precede. options: of the reverse process. kind: a class, or "all" in turn. */
export function useNetwork(opened, { kind = "all", seed = 0, ...options } = {}) {
  const isOther = opened !== network, { size, betas, variance, classes } = network = opened;
  const y = Array.from({ length: COUNT }, (_, k) => kind === "all" ? k % classes.length : Number(kind));
  pictures.use(modelOf(network, y, 0), { betas, variance, ...options });
  pictures.begin(new Float32Array(COUNT * size), noiseOf(seed, COUNT, size)());
  expected = { x0: null, place: -1, asked: false };
  state.fault = "";
  gesture.stop();
  gesture.begun = false;
  gesture.moveTo(1);
  if (isOther) useKinds();
  begin();
}

/** Say what the network draws, offer its kinds, and forget the guidance strip of the one before. */
function useKinds() {
  const { name, classes, shape: [channels, height, width] } = network;
  $("images-about").textContent = ABOUT[name] ?? `Your network draws ${channels === 3 ? "coloured" : "grey"} pictures of ${width} × ${height} pixels.`;
  for (const element of document.querySelectorAll(".classes")) element.hidden = !classes.length;
  $("image-kind").replaceChildren(new Option("all in turn", "all"), new Option("any kind", classes.length),
    ...classes.map((name, k) => new Option(name, k)));
  strip.stop();
  state.isStripDrawn = false;
  for (const w of STRIP) $(`strip-${w}`).width += 0; // clears it
}

export const useSettings = (settings) => network && useNetwork(network, settings);

/** Send the first pictures back when they are seen. Without motion, only the result is shown. */
function begin() {
  if (!network) return;
  if (state.isSeen && !gesture.begun) {
    gesture.begun = true;
    state.sweeps = !still;
    gesture.sendBack();
    if (still) gesture.finish();
  }
  if (state.isStripSeen && network.classes.length && !state.isStripDrawn && !strip.busy) strip.start(drawStrip).catch(fail);
}

/** Ask what the network expects at the place of the slider, one question at a time. */
async function ask() {
  const { place, isBack } = gesture, own = expected;
  if (!pictures.eps || isBack || !place || own.asked || own.place === place) return;
  own.asked = true;
  const { x } = pictures.at(place), t = gesture.level;
  try {
    const x0 = predictX0(x, await pictures.eps(x, t), pictures.abars[t]);
    Object.assign(own, { x0, place, asked: false });
    gesture.render(); // and ask again, if the slider has moved
  } catch (error) {
    if (own === expected) fail(error);
  }
}

/** Draw the guidance strip: pictures from the same noise with each strength, their time, and the distance. */
async function drawStrip(run) {
  const { name, classes, size, betas, variance } = network, kind = Math.max(0, classes.indexOf(KINDS[name]));
  const y = new Array(EACH).fill(kind), hasDistances = name === "fashion-mnist.onnx";
  $("strip-kind").textContent = classes[kind];
  $("strip").classList.toggle("measured", hasDistances);
  const show = (id, share, text) => {
    $(id).style.setProperty("--share", share);
    $(id).textContent = text;
  };
  let first; // the time without guidance
  for (const [k, w] of STRIP.entries()) {
    while (!gesture.isComplete && !run.stopped) await pause(200); // so that the time is that of the strip
    const began = performance.now(), xT = noiseOf(2, EACH, size)();
    const options = { sampler: "sa-solver", steps: Math.min(10, betas.length), variance, xT };
    for await (const { x0 } of sampleProgressive(modelOf(network, y, w), null, betas, options)) {
      if (run.stopped) return;
      drawImages($(`strip-${w}`), x0, network.shape, 2, 1);
    }
    const time = (performance.now() - began) / 1000;
    first ??= time;
    show(`strip-time-${w}`, Math.min(1, time / first / 2.5), `${time.toFixed(1)} s`);
    show(`strip-distance-${w}`, DISTANCES[k] / DISTANCES.at(-1), `distance ${DISTANCES[k]}`);
  }
  state.isStripDrawn = true;
}

// ---- what shows it

function captions() {
  const { place, isBack, isComplete } = gesture;
  if (state.fault) return ["No network", state.fault];
  if (!network) return ["Noise", "The network is loading."];
  if (isBack && !place && isComplete) return ["They are back", "Drag the slider to see what the network still recognises, and let go."];
  if (isBack) return [`Back in ${pictures.tau.length} steps`, "In each step, the network is asked what it expects, and the noisy pictures go a part of the way."];
  if (place === 1) return ["Only noise is left", "All pictures of a kind are possible, and their mean is a blur. Let go, and new ones come back."];
  return ["Noise is added", "The more noise there is, the more pictures are possible, and the more their mean is blurred. Let go, and pictures come back."];
}

function say() {
  const [title, words] = captions();
  [$("images-title").textContent, $("images-text").textContent] = [title, words];
  return `${title}. ${words}`;
}

function draw() {
  const { place, isBack } = gesture, { x, x0 } = pictures.at(place), shape = network?.shape ?? [1, 32, 32];
  if (state.sweeps && isBack) $("images-curtain").value = 50 + 40 * Math.sin(2 * Math.PI * (1 - place));
  state.sweeps &&= place > 0;
  if (expected && (isBack || !place)) Object.assign(expected, { x0: null, place: -1 });
  $("images-stage").style.setProperty("--curtain", `${$("images-curtain").value}%`);
  drawImages($("images-noisy"), x, shape, COLUMNS, 1);
  drawImages($("images-expected"), network ? (!isBack && expected.x0) || x0 : x, shape, COLUMNS, 1);
  drawFilm(shape);
  ask();
}

/** The chosen picture in some of the steps, and below it what was expected of it. */
function drawFilm(shape) {
  const { steps, tau } = pictures, size = pictures.x0.length / COUNT, film = new Float32Array(2 * FILM * size);
  $("images-film-figure").style.visibility = steps?.length ? "" : "hidden";
  for (let k = 0; steps?.length && k < FILM; k++) {
    const step = steps[Math.round((k * (tau.length - 1)) / (FILM - 1))];
    ["x", "x0"].forEach((key, row) => step && film.set(
      step[key].subarray(state.chosen * size, (state.chosen + 1) * size), (row * FILM + k) * size));
  }
  drawImages($("images-film"), film, shape, FILM, 1);
}

/** Make the section work. */
export function startImages() {
  gesture = new Gesture("images", [pictures], draw, say);
  pictures.begin(new Float32Array(COUNT * 1024), noiseOf(0, COUNT, 1024)());
  gesture.moveTo(1);
  const curtain = $("images-curtain"), choose = (k) => {
    state.chosen = (k + COUNT) % COUNT;
    gesture.render();
  };
  curtain.oninput = () => {
    state.sweeps = false;
    gesture.render();
  };
  curtain.onpointermove = ({ offsetX, offsetY }) => {
    const [column, row] = [offsetX, offsetY].map((at) => Math.floor((COLUMNS * at) / curtain.clientWidth));
    if (Math.min(column, row) >= 0 && Math.max(column, row) < COLUMNS) choose(COLUMNS * row + column);
  };
  curtain.onkeydown = (event) => { // left and right move the curtain
    const turn = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!turn) return;
    event.preventDefault();
    choose(state.chosen + turn);
  };
  for (const [id, key] of [["images-stage", "isSeen"], ["strip", "isStripSeen"]]) {
    follow($(id), (isSeen) => {
      state[key] = isSeen;
      begin();
    }, 0.3);
  }
}
