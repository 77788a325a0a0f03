// The opening: pictures dissolve into noise, and the network of the emoji draws new ones.

import { $, captions, still } from "./common.js";
import { Passage } from "./passage.js";
import { drawImages } from "./plane.js";
import { guided, noiseOf, partsAt } from "./sampler.js";
import { Gesture } from "./timeline.js";

const COUNT = 12, SHAPE = [3, 32, 32], SIZE = 3072, STEPS = 10, GUIDANCE = 1;
const show = captions("scene");
let gesture, isOffline = false; // then each way back is the recorded one, from noise
let rows = []; // of recorded.webp: the pictures at the beginning, and then the recorded way back
let fault = "The first pictures could not be loaded. Remove the noise, and new ones come back.";
const pictures = new Passage(null, { steps: STEPS, scales: true, recorded }, (error) => {
  if (error) fail(error);
  gesture.render();
});

/** The twelve pictures in a row of recorded.webp, by docs/make_figures.py: first those at the
 * beginning, and then the estimates in each step of the first way back, which needs no network. */
function rowOf(recording, row) {
  const width = 32 * COUNT, context = new OffscreenCanvas(width, 32).getContext("2d");
  context.drawImage(recording, 0, -32 * row);
  const { data } = context.getImageData(0, 0, width, 32);
  return Float32Array.from({ length: SIZE * COUNT }, (_, i) => {
    const k = Math.floor(i / SIZE), c = (i >> 10) % 3, y = (i >> 5) % 32;
    return data[4 * (y * width + 32 * k + (i % 32)) + c] / 127.5 - 1;
  });
}

/** From noise, the first way back is recorded. It needs no network. */
function recorded(place) {
  if (!rows.length || place < 1 || (gesture.round > 1 && !isOffline)) return null;
  return (x, t) => { // the eps of the recorded estimate (15)
    const x0 = rows[STEPS - Math.floor(t / 100)], [signal, spread] = partsAt(t);
    return x.map((value, k) => (value - signal * x0[k]) / spread);
  };
}

/** Let the network draw, in each place what the recording has there. */
export function useNetwork(network) {
  const kindOf = (_, k) => network.kinds[(k + Math.floor(k / 6) + 1) % 3];
  pictures.use(guided(network, Array.from({ length: COUNT }, kindOf), GUIDANCE));
  gesture.render();
}

/** Go on with the recording, which needs no network, if there is one. */
export function fail({ message }) {
  [isOffline, fault] = [true, message];
  if (!rows.length) return gesture.stop();
  const isShown = gesture.isBack && !pictures.isWaiting;
  pictures.use(null, { keepsData: true });
  if (isShown) return;
  pictures.begin(rows[0], pictures.noise);
  if (gesture.state !== "idle") gesture.letGo();
}

function say() {
  const { place, isBack, state } = gesture, { from, x0, isWaiting } = pictures;
  $("scene-play").textContent = state !== "idle" ? "Stop" : place ? "Remove the noise" : "Play";
  if (!rows.length && (isOffline || !(x0 || isBack))) return show("fault", { text: fault });
  if (isWaiting) return show("wait");
  if (!isBack) return show(!place ? "clean" : place < 1 ? "noising" : "noise");
  if (place) return show(isOffline ? "recorded" : "back");
  return show(from > 0.9 ? "new" : "similar");
}

/** Make the opening work, with noise if there is no recording. Returns its timeline. */
export function startOpening(recording) {
  if (recording) rows = Array.from({ length: STEPS + 1 }, (_, row) => rowOf(recording, row));
  pictures.begin(rows[0] ?? null, noiseOf(0, COUNT, SIZE));
  gesture = new Gesture("scene", [pictures], () => {
    const columns = innerWidth < 736 ? 4 : 6;
    drawImages($("scene-pictures"), pictures.at(gesture.place).x, SHAPE, columns, 1);
  }, say);
  gesture.letGo = () => {
    const lacksNoise = isOffline && !gesture.isBack && gesture.place < 1;
    return !gesture.place || lacksNoise ? gesture.toNoise() : gesture.sendBack();
  };
  $("scene-play").onclick = () => {
    if (gesture.state !== "idle") return gesture.stop();
    gesture.stage.scrollIntoView({ block: "nearest" }); // only what is in sight moves
    gesture.letGo();
  };
  gesture.repeats = !still;
  gesture.moveTo(recording ? 0 : 1);
  if (!still) gesture.letGo();
  return gesture;
}
