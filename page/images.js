// Section 3: images. The gesture of the opening with a grid of pictures, under a curtain.

import { $, onTurn, still, whenNear } from "./common.js";
import { Gesture } from "./gesture.js";
import { Passage } from "./passage.js";
import { drawFilm, drawImages, frame, pictureAt } from "./plane.js";
import { noiseOf, predictX0 } from "./sampler.js";

const COLUMNS = 5, ROWS = 3, COUNT = COLUMNS * ROWS;
const KNOWN = { // from what the included networks have learnt, and what a guess is the average of
  "fashion-mnist.onnx": ["60,000 pictures of clothes", "all clothes of a kind"],
  "emoji.onnx": ["3,743 emoji", "all smileys, all people or all flags"],
};

const state = { chosen: 0, awaited: "clothes", fault: "", sweeps: false, isTouched: false, isNear: false }; // isTouched: the curtain, by the reader
let network = null;
export let expected; // {x0, place, asked}: what the network expects on the way to the noise
export const pictures = new Passage(null, { sampler: "dpm-solver++", steps: 10, scales: true }, (error) => {
  if (error) fail(error);
  gesture.render();
});
export let gesture;

// ---- what changes it

export function fail(error) {
  state.fault = error.message.split("\n")[0];
  say();
}

/** Say that the network for something is loading. */
export function awaitNetwork(name) {
  state.awaited = name;
  say();
}

/** Begin with noise, which no pictures precede. The classes take turns. options: of the reverse process. */
export function useNetwork(opened, { seed = 0, ...options } = {}) {
  const { name, size, betas, variance, classes, kinds = [...classes.keys()], shape: [channels, height, width] } = network = opened;
  const y = kinds.length ? Array.from({ length: COUNT }, (_, k) => kinds[k % kinds.length]) : undefined;
  $("images-about").textContent = KNOWN[name] ? `This network has learnt from ${KNOWN[name][0]}.` : `Your network draws ${channels === 3 ? "coloured" : "grey"} pictures of ${width} × ${height} pixels.`;
  pictures.use((x, t) => opened.eps(x, t, y), { betas, variance, ...options });
  pictures.begin(new Float32Array(COUNT * size), noiseOf(seed, COUNT, size)());
  expected = { x0: null, place: -1, asked: false };
  state.fault = state.awaited = "";
  $("images-film").width += 0; // clears it
  gesture.stop();
  gesture.begun = false;
  gesture.moveTo(1);
  begin();
}

export const useSettings = (settings) => network && useNetwork(network, settings);

/** Send the first pictures back when they will soon be seen. Without motion, only the result is shown. */
function begin() {
  if (!network || !state.isNear || gesture.begun) return;
  gesture.begun = true;
  state.sweeps = !still && !state.isTouched;
  gesture.sendBack();
  if (still) gesture.finish();
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

// ---- what shows it

function captions() {
  const { place, isBack, isComplete } = gesture;
  if (state.fault) return ["No network", state.fault];
  if (state.awaited) return ["One moment", `The network for ${state.awaited} is loading.`];
  if (isBack && !place && isComplete) return ["Back from the noise", "Without noise, both sides of the curtain are the same. Drag the slider, and see what the network still recognises."];
  if (isBack) return [`Back in ${pictures.levels.length} steps`, "In each step, the network guesses, and the noisy pictures move a little towards its guess."];
  if (place === 1) return ["Only noise is left", `The network's guess is the average of ${KNOWN[network?.name]?.[1] ?? "all pictures"}: a blur. Let go, and new pictures come back.`];
  return ["Noise is added", "The more noise there is, the more pictures are possible, and the blurrier their average is. Let go, and pictures come back."];
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
  $("images-grid").style.setProperty("--curtain", `${$("images-curtain").value}%`);
  frame($("images-grid"), state.chosen, COLUMNS, ROWS);
  drawImages($("images-noisy"), x, shape, COLUMNS, 1);
  drawImages($("images-expected"), network ? (!isBack && expected.x0) || x0 : x, shape, COLUMNS, 1);
  const { steps, levels } = pictures; // on the way to the noise, the film shows the last way back
  if (steps?.length) drawFilm($("images-film"), steps, { k: state.chosen, count: COUNT, shape, total: levels.length + 1 });
  $("images-film").classList.toggle("old", !steps?.length);
  ask();
}

/** Make the section work. */
export function startImages() {
  gesture = new Gesture("images", [pictures], draw, say);
  pictures.begin(new Float32Array(COUNT * 1024), noiseOf(0, COUNT, 1024)());
  gesture.moveTo(1);
  const curtain = $("images-curtain"), grid = $("images-grid"), choose = (k) => {
    state.chosen = (k + COUNT) % COUNT;
    gesture.render();
  };
  const move = (value) => {
    Object.assign(state, { sweeps: false, isTouched: true });
    curtain.value = value;
    gesture.render();
  };
  curtain.oninput = () => move(curtain.value);
  let from = null; // where a pointer went down; a drag moves the curtain, and a click chooses
  grid.onpointerdown = (event) => {
    from = event.clientX;
    grid.setPointerCapture(event.pointerId);
  };
  grid.onpointermove = (event) => {
    if (event.pointerType === "mouse" && !event.buttons) choose(pictureAt(event, grid, COLUMNS, ROWS));
    if (from === null || Math.abs(event.clientX - from) < 6) return;
    from = NaN; // it moves from now on
    move((100 * (event.clientX - grid.getBoundingClientRect().left)) / grid.clientWidth);
  };
  grid.onpointerup = grid.onpointercancel = (event) => {
    if (event.type === "pointerup" && !Number.isNaN(from)) choose(pictureAt(event, grid, COLUMNS, ROWS));
    from = null;
  };
  onTurn(curtain, (turn) => choose(state.chosen + turn));
  whenNear("learning", "images-stage", () => {
    state.isNear = true;
    begin();
  });
}
