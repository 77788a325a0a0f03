// The opening: pictures dissolve into noise, and the network of the emoji draws new ones.

import { $, still } from "./common.js";
import { Gesture } from "./gesture.js";
import { included } from "./networks.js";
import { Passage } from "./passage.js";
import { drawImages } from "./plane.js";
import { guided, noiseOf, partsAt } from "./sampler.js";

const COUNT = 12, SHAPE = [3, 32, 32], SIZE = 3072, STEPS = 12;
const KINDS = ["smileys", "people", "flags"], GUIDANCE = 1;
const columns = () => (innerWidth < 736 ? 4 : 6);
let fault = ""; // of the network
let turn = 0; // each time that they come back from only noise, the pictures are of the next kind
export let gesture;
export const pictures = new Passage(eps, { sampler: "ddim", steps: STEPS }, (error) => {
  if (error) fault = error.message.split("\n")[0];
  gesture.render();
});

/** The first way back is recorded in recorded.webp, by docs/make_figures.py: the network may still be loading. */
async function eps(x, t) {
  if (t === 999) turn++;
  if (gesture.round === 1 && pictures.from === 1) {
    const [signal, spread] = partsAt(t), x0 = recorded(1 + Math.floor(((999 - t) * STEPS) / 1000));
    return x.map((value, k) => (value - signal * x0[k]) / spread);
  }
  const network = await included("emoji"), kinds = KINDS.map((kind) => network.classes.indexOf(kind));
  return guided(network, Array.from({ length: COUNT }, (_, k) => kinds[(k + Math.floor(k / 6) + turn) % kinds.length]), GUIDANCE)(x, t);
}

/** A row of the recording, COUNT pictures in [-1, 1]: the first one begins, and the estimates of each step follow. */
function recorded(row) {
  const context = new OffscreenCanvas(32 * COUNT, 32).getContext("2d");
  context.drawImage($("scene-recording"), 0, -32 * row);
  const { data } = context.getImageData(0, 0, 32 * COUNT, 32);
  return Float32Array.from({ length: COUNT * SIZE }, (_, i) => {
    const k = Math.floor(i / SIZE), c = (i >> 10) % 3, y = (i >> 5) % 32;
    return data[4 * (32 * (y * COUNT + k) + (i % 32)) + c] / 127.5 - 1;
  });
}

/** The heading below the pictures, and what to see. */
function captions() {
  const { place, isBack } = gesture, { from, jumps, steps } = pictures;
  if (fault) return ["No network", fault];
  if (!isBack && !place) return ["Clean", "A network has drawn these twelve pictures."];
  if (!isBack && place < 1) return ["Noise is added", "The pictures disappear in the noise."];
  if (!isBack) return ["Only noise is left", "Nobody can tell what was here. Let go, and the way back begins."];
  if (jumps) {
    return ["Back in one jump", !steps.length ? "The network is getting ready."
      : from < 0.2 ? "With so little noise, a jump ends almost where it began."
      : from < 0.7 ? "The pictures lose some of their detail. Jump from more noise to see the difference."
      : "A jump ends at the average of all pictures that are possible: a blur."];
  }
  if (place) return ["Back in many steps", steps.length ? "In each step, the network removes a little of the noise." : "The network is getting ready."];
  return ["Back from the noise", from > 0.9 ? "These pictures are new. Nobody has drawn them."
    : from > 0.5 ? "From less noise, similar pictures come back." : "From so little noise, the same pictures come back."];
}

function say() {
  const [title, text] = captions();
  [$("scene-title").textContent, $("scene-text").textContent] = [title, text];
  $("scene-many").textContent = gesture.moving ? "Pause" : gesture.paused ? "Continue" : gesture.place ? "Back in many steps" : "Play";
  return `${title}. ${text}`;
}

/** Send everything back for the reader, or stop. Only what is in sight moves. */
function press(jumps) {
  if (!jumps && (gesture.moving || gesture.paused)) return gesture.pause();
  if (jumps && gesture.moving && pictures.jumps) return; // it jumps
  gesture.stop();
  gesture.stage.scrollIntoView({ block: "nearest" });
  gesture.sendBack(jumps);
}

/** Make the opening work, which begins with the recording. */
export async function startOpening() {
  await $("scene-recording").decode();
  pictures.begin(recorded(0), noiseOf(0, COUNT, SIZE)());
  gesture = new Gesture("scene", [pictures], () => drawImages($("scene-pictures"), pictures.at(gesture.place).x, SHAPE, columns(), 1), say);
  $("scene-many").onclick = () => press(false);
  $("scene-one").onclick = () => press(true);
  Object.assign(gesture, { moving: !still, repeats: !still });
  gesture.render();
}
