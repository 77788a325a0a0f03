// Section 3: images. The gesture of the opening with a grid of pictures, under a curtain.

import { $, captions, still } from "./common.js";
import { Passage } from "./passage.js";
import { drawImages } from "./plane.js";
import { guided, noiseOf, predictX0 } from "./sampler.js";
import { Gesture } from "./timeline.js";

const COLUMNS = 5, COUNT = 15, FILM = 11; // columns of the pictures and of the film
const WORDS = { none: null, weak: 0, strong: 3 }; // the guidance of each choice; null: no word
const curtain = $("images-curtain"), show = captions("images");
let network = null, word = "strong", notice = ["wait", "clothes"]; // the key of a caption, and text
let guess = {}; // of the network on the way to the noise: {x0, place, isAsked}
let sweeps = false; // whether the curtain moves by itself
let gesture;
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
  pictures.begin(null, noiseOf(0, COUNT, size)());
  [guess, notice] = [{}, null];
  $("images-film").width += 0; // clears it
  gesture.stop();
  gesture.moveTo(1);
  gesture.whenSeen(() => {
    sweeps = !still;
    gesture.sendBack();
    if (still) gesture.place = 0;
  });
}

/** Ask what the network guesses at the place of the slider, one question at a time. */
async function ask() {
  const { place, isBack } = gesture, own = guess;
  if (!network || isBack || !place || !pictures.x0) return;
  if (own.isAsked || own.place === place) return;
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

function say() {
  const { place, isBack, hasCome } = gesture;
  if (notice) return show(notice[0], { text: notice[1] });
  if (hasCome) return show(network.kinds ? word : "done");
  if (isBack) return show("back", { steps: pictures.levels.length });
  return show(place < 1 ? "noising" : "noise");
}

function draw() {
  const { place, isBack } = gesture, { x, x0, level } = pictures.at(place);
  const shape = network?.shape ?? [1, 32, 32];
  if (sweeps && isBack) curtain.value = 50 + 40 * Math.sin(2 * Math.PI * (1 - place));
  sweeps &&= place > 0;
  if (isBack || !place) guess = {};
  curtain.parentElement.style.setProperty("--curtain", `${curtain.value}%`);
  drawImages($("images-noisy"), x, shape, COLUMNS, 1);
  drawImages($("images-expected"), network ? (!isBack && guess.x0) || x0 : x, shape, COLUMNS, 1);
  if (isBack) drawFilm(pictures.steps.filter(({ t }) => t >= Math.floor(level)), shape);
  $("images-film").classList.toggle("old", !isBack); // the film of the last way back
  ask();
}

/** Show the steps of the first picture so far, from left to right: x_t, and below it the guess. */
function drawFilm(steps, shape) {
  const size = shape[0] * shape[1] * shape[2], film = new Float32Array(2 * FILM * size).fill(-0.8);
  for (let column = 0; column < FILM; column++) {
    const step = steps[Math.round((column * pictures.levels.length) / (FILM - 1))];
    if (!step) break;
    film.set(step.x.subarray(0, size), column * size);
    film.set(step.x0.subarray(0, size), (FILM + column) * size);
  }
  drawImages($("images-film"), film, shape, FILM, 1);
}

/** Make the section work. Returns its timeline. */
export function startImages() {
  pictures.begin(null, noiseOf(0, COUNT, 1024)());
  gesture = new Gesture("images", [pictures], draw, say);
  const letGo = gesture.letGo.bind(gesture);
  gesture.letGo = () => network && letGo();
  gesture.moveTo(1);
  curtain.oninput = () => {
    sweeps = false;
    gesture.render();
  };
  for (const key of Object.keys(WORDS)) {
    $(`word-${key}`).onclick = () => {
      word = key;
      for (const it of Object.keys(WORDS)) $(`word-${it}`).ariaPressed = String(it === key);
      useNetwork(network);
    };
  }
  return gesture;
}
