// The opening: pictures dissolve into noise, and the network of the emoji draws new ones.

import { $, captions, still } from "./common.js";
import { included } from "./network.js";
import { Passage } from "./passage.js";
import { drawImages } from "./plane.js";
import { guided, noiseOf } from "./sampler.js";
import { Gesture } from "./timeline.js";

const COUNT = 12, SHAPE = [3, 32, 32], SIZE = 3072, STEPS = 10, GUIDANCE = 1;
const show = captions("scene");
let gesture, pictures, isOffline = false; // then each way back is the recorded one, from noise

/** The twelve pictures in a row of recorded.webp, by docs/make_figures.py: first those at the
 * beginning, and then the estimates in each step of the first way back, which needs no network. */
function rowOf(row) {
  const width = 32 * COUNT, context = new OffscreenCanvas(width, 32).getContext("2d");
  context.drawImage($("recording"), 0, -32 * row);
  const { data } = context.getImageData(0, 0, width, 32);
  return Float32Array.from({ length: SIZE * COUNT }, (_, i) => {
    const k = Math.floor(i / SIZE), c = (i >> 10) % 3, y = (i >> 5) % 32;
    return data[4 * (y * width + 32 * k + (i % 32)) + c] / 127.5 - 1;
  });
}

/** The network, which draws in each place what the recording has there. */
async function eps(x, t) {
  const network = await included("emoji"), { kinds } = network;
  const y = Array.from({ length: COUNT }, (_, k) => kinds[(k + Math.floor(k / 6) + 1) % 3]);
  return guided(network, y, GUIDANCE)(x, t);
}

function say() {
  const { place, isBack, state } = gesture, { from } = pictures;
  $("scene-play").textContent = state !== "idle" ? "Stop" : place ? "Remove the noise" : "Play";
  if (!isBack) return show(!place ? "clean" : place < 1 ? "noising" : "noise");
  if (place) return show(isOffline ? "recorded" : "back");
  return show(from > 0.9 ? "new" : "similar");
}

/** Go on with the recording, which needs no network. */
function goOffline() {
  isOffline = true;
  pictures.use(eps, { keepsData: true });
  if (gesture.isBack) return;
  if (gesture.round > 1) pictures.begin(rowOf(0), pictures.noise);
  if (gesture.state !== "idle") gesture.letGo();
}

/** Make the opening work. Returns its timeline. */
export async function startOpening() {
  await $("recording").decode();
  const estimates = Array.from({ length: STEPS }, (_, k) => rowOf(k + 1));
  const recorded = (place) => place === 1 && (gesture.round === 1 || isOffline) && estimates;
  const options = { steps: STEPS, scales: true, recorded };
  pictures = new Passage(eps, options, (error) => {
    if (error) goOffline();
    gesture.render();
  });
  pictures.begin(rowOf(0), noiseOf(0, COUNT, SIZE));
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
  included("emoji").catch(goOffline);
  gesture.repeats = !still;
  if (still) gesture.render();
  else gesture.toNoise();
  return gesture;
}
