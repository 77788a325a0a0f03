// Section 3: images. The gesture of the opening with a grid of pictures, under a curtain.

import { $, captions, onPointer, still } from "./common.js";
import { Passage } from "./passage.js";
import { drawImages, partOf } from "./plane.js";
import { guided, noiseOf, predictX0 } from "./sampler.js";
import { Gesture } from "./timeline.js";

const COLUMNS = 5, ROWS = 3, COUNT = COLUMNS * ROWS;
const FILM = 11; // columns of the film
const KNOWN = { // what the included networks have learnt from, and what a guess is the average of
  "fashion-mnist.onnx": ["60,000 pictures of clothes", "all clothes of a kind"],
  "emoji.onnx": ["3,743 emoji", "all smileys, all people or all flags"],
};
const WORDS = { none: null, weak: 0, strong: 3 }; // the guidance of each choice; null: no word
const curtain = $("images-curtain"), grid = $("images-grid"), show = captions("images");
let network = null, word = "weak", chosen = 0, notice = null; // notice: [the key of a caption, text]
let guess = {}; // of the network on the way to the noise: {x0, place, isAsked}
let sweeps = false, isTouched = false; // the curtain: by itself, and by the reader
let gesture;
const pictures = new Passage(null, { steps: 10, scales: true }, (error) => {
  if (error) tell("fault", error.message);
  gesture.render();
});

// ---- what changes it

/** Say that a network is loading, or why there is none. */
export function tell(key, text) {
  notice = [key, text];
  say();
}

/** Begin with noise, which no pictures precede. The classes take turns; of the emoji, each row has one. */
export function useNetwork(opened) {
  network = opened;
  const { name, size, betas, classes, kinds, shape: [channels, height, width] } = network;
  const classOf = (k) => (kinds ? kinds[Math.floor(k / COLUMNS)] : k % classes.length);
  const y = classes.length ? Array.from({ length: COUNT }, (_, k) => classOf(k)) : undefined;
  const w = kinds ? WORDS[word] : 0, colour = channels === 3 ? "coloured" : "grey";
  $("images-about").textContent = KNOWN[name] ? `This network has learnt from ${KNOWN[name][0]}.`
    : `Your network draws ${colour} pictures of ${width} × ${height} pixels.`;
  $("images-words-of-emoji").hidden = !kinds;
  pictures.use(w === null ? (x, t) => opened.eps(x, t) : guided(opened, y, w), { betas });
  pictures.begin(new Float32Array(COUNT * size), noiseOf(0, COUNT, size)());
  [guess, notice] = [{}, null];
  $("images-film").width += 0; // clears it
  gesture.stop();
  gesture.moveTo(1);
  gesture.whenSeen(() => {
    sweeps = !still && !isTouched;
    gesture.sendBack();
    if (still) gesture.finish();
  });
}

/** Ask what the network guesses at the place of the slider, one question at a time. */
async function ask() {
  const { place, isBack } = gesture, own = guess;
  if (!network || isBack || !place || own.isAsked || own.place === place) return;
  own.isAsked = true;
  const { x, level } = pictures.at(place), t = Math.max(0, Math.round(level));
  try {
    const x0 = predictX0(x, await pictures.eps(x, t), pictures.abars[t], 1);
    Object.assign(own, { x0, place, isAsked: false });
    gesture.render(); // and ask again, if the slider has moved
  } catch (error) {
    if (own === guess) tell("fault", error.message);
  }
}

// ---- what shows it

function say() {
  const { place, isBack, hasCome } = gesture, known = KNOWN[network?.name]?.[1];
  const key = hasCome ? (network.kinds ? word : "done") : isBack ? "back" : place < 1 ? "noising" : "noise";
  const all = !known || (network.kinds && word === "none") ? "all pictures" : known;
  const values = { all, steps: pictures.levels?.length, text: notice?.[1] };
  return show(notice ? notice[0] : key, values);
}

function draw() {
  const { place, isBack } = gesture, { x, x0, level } = pictures.at(place);
  const shape = network?.shape ?? [1, 32, 32];
  if (sweeps && isBack) curtain.value = 50 + 40 * Math.sin(2 * Math.PI * (1 - place));
  sweeps &&= place > 0;
  if (isBack || !place) guess = {};
  grid.style.setProperty("--curtain", `${curtain.value}%`);
  grid.style.setProperty("--column", chosen % COLUMNS);
  grid.style.setProperty("--row", Math.floor(chosen / COLUMNS));
  drawImages($("images-noisy"), x, shape, COLUMNS, 1);
  drawImages($("images-expected"), network ? (!isBack && guess.x0) || x0 : x, shape, COLUMNS, 1);
  if (isBack) drawFilm(pictures.steps.filter(({ t }) => t >= Math.floor(level)), shape);
  $("images-film").classList.toggle("old", !isBack); // the film of the last way back
  ask();
}

/** Show the steps of the chosen picture so far, from left to right: x_t, and below it the guess. */
function drawFilm(steps, shape) {
  const size = shape[0] * shape[1] * shape[2], film = new Float32Array(2 * FILM * size).fill(-0.8);
  for (let column = 0; column < FILM; column++) {
    const step = steps[Math.round((column * pictures.levels.length) / (FILM - 1))];
    if (!step) break;
    film.set(partOf(step.x, chosen, COUNT), column * size);
    film.set(partOf(step.x0, chosen, COUNT), (FILM + column) * size);
  }
  drawImages($("images-film"), film, shape, FILM, 1);
}

// ---- the curtain and the choices

function move(value) {
  [sweeps, isTouched, curtain.value] = [false, true, value];
  gesture.render();
}

function choose(k) {
  chosen = (k + COUNT) % COUNT;
  gesture.render();
}

/** Where a pointer is in the grid, as shares of its width and its height. */
function placeOf({ clientX, clientY }) {
  const { left, top, width, height } = grid.getBoundingClientRect();
  const shares = [(clientX - left) / width, (clientY - top) / height];
  return shares.map((share) => Math.max(0, Math.min(0.999, share)));
}

/** Make the section work. Returns its timeline. */
export function startImages() {
  pictures.begin(new Float32Array(COUNT * 1024), noiseOf(0, COUNT, 1024)());
  gesture = new Gesture("images", [pictures], draw, say);
  const letGo = gesture.letGo.bind(gesture);
  gesture.letGo = () => network && letGo();
  gesture.moveTo(1);
  curtain.oninput = () => move(curtain.value);
  curtain.onkeydown = (event) => { // left and right move the curtain
    const turn = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!turn) return;
    event.preventDefault();
    choose(chosen + turn);
  };
  onPointer(grid, { // a drag moves the curtain, and a click chooses
    drag: (event, moved) => moved && move(100 * placeOf(event)[0]),
    release(event, moved) {
      const [across, down] = placeOf(event);
      if (!moved) choose(Math.floor(COLUMNS * across) + COLUMNS * Math.floor(ROWS * down));
    },
  });
  for (const key of Object.keys(WORDS)) {
    $(`word-${key}`).onclick = () => {
      word = key;
      for (const other of Object.keys(WORDS)) $(`word-${other}`).ariaPressed = String(other === key);
      useNetwork(network);
    };
  }
  return gesture;
}
