// The opening: a picture, which the included network draws, and then dots beside it.

import { $, still } from "./common.js";
import { Gesture } from "./gesture.js";
import { included } from "./networks.js";
import { Passage } from "./passage.js";
import { drawImages } from "./plane.js";
import { DATA, N, Scene } from "./scene.js";
import { noiseOf, partsAt } from "./sampler.js";

const SHAPE = [1, 32, 32], SIZE = 1024;
const STREAM = 1; // the noise of the recording: recorded.webp, by docs/make_figures.py
const JOIN = 3000; // milliseconds for which the dots appear, before they move
let fault = ""; // of the network
/** Whether there is only the picture, which the dots join in the second round. */
const isAlone = () => !still && gesture.round === 1;
export let scene, gesture;
export const picture = new Passage(null, { sampler: "ddim", steps: 25 }, (error) => {
  if (error) fault = ` The network failed: ${error.message.split("\n")[0]}`;
  gesture.render();
});

/** The heading beside the picture, and what to see. */
function captions() {
  const { place, isBack } = gesture, { from, jumps } = scene, alone = isAlone();
  if (!isBack && !place) return alone ? ["Clean", "A small picture of a shoe."] : ["A picture is a dot", `A picture of two pixels is a dot in a plane. Here are ${N} of them, on two arcs.`];
  if (!isBack && place === 1) return ["Only noise is left", "Nobody can tell what was here. Let go, and the way back begins."];
  if (!isBack) return ["Noise is added", alone ? "The picture turns grey under the noise." : "The picture turns grey under the noise. So do the dots: grey lies in the middle, and the noise scatters them."];
  if (jumps) {
    return ["Back in one jump", from < 0.2 ? "With so little noise, a jump ends almost where it began. Jump from more noise to see the difference."
      : from < 0.7 ? `The picture loses some of its detail.${alone ? "" : " Each dot jumps to the average of its possible origins, which lies between them."}`
      : `The average of many pictures is a blur.${alone ? "" : " All dots jump to almost the same place, the average of all, which lies on neither arc."}`];
  }
  if (place) return ["Back in many steps", alone ? "The noise is removed in many small steps, and a new picture appears." : "Each dot follows its arrow a little, and then it gets a new arrow. The picture does the same."];
  if (alone) return ["Back from the noise", from > 0.9 ? "This picture is new. Nobody has drawn it." : "From so little noise, the same picture comes back."];
  const { swapped } = scene;
  return ["Back from the noise", swapped < N / 4 ? `From so little noise, ${swapped ? `all but ${swapped} of the ${N} dots` : "all dots"} came back to their own arc. From more noise, new ones come back.`
    : `${from > 0.9 ? "A new picture, and new dots" : "New dots"}: the arcs are the same, but ${swapped} of the ${N} dots are now on the other arc.`];
}

/** Let the dots join the picture. */
function join() {
  $("scene").classList.remove("alone");
  gesture.hold = JOIN;
  scene.labels = null; // they begin with the data
  scene.begin(DATA, scene.noise);
}

function say() {
  if (!isAlone() && $("scene").classList.contains("alone")) join();
  const [title, words] = captions(), text = words + fault;
  [$("scene-title").textContent, $("scene-text").textContent] = [title, text];
  $("scene-many").textContent = gesture.moving ? "Pause" : gesture.paused ? "Continue" : gesture.place ? "Back in many steps" : "Play";
  return `${title}. ${text}`;
}

function draw() {
  if (!isAlone()) scene.draw(gesture.place);
  if (!picture.x0) return;
  const { x, x0 } = picture.at(gesture.place);
  Object.entries({ picture: x, guess: x0, before: picture.x0 }).forEach(([name, shown]) => drawImages($(`scene-${name}`), shown, SHAPE));
  $("scene-beside").style.visibility = gesture.isBack ? "" : "hidden";
}

/** Let the network draw the picture, in place of the recording. */
export function useNetwork(opened) {
  picture.eps = (x, t) => opened.eps(x, t);
  if (!picture.isComplete) picture.sample();
}

/** The grey pixels of an image in [-1, 1], when it is loaded. */
async function valuesOf(image) {
  await image.decode();
  const { naturalWidth: width, naturalHeight: height } = image;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  return Float32Array.from({ length: width * height }, (_, k) => data[4 * k] / 127.5 - 1);
}

/** Send the picture back from the noise by the estimates of a recording, the rows of recorded.webp. */
function useRecording(estimates) {
  const rows = estimates.length / SIZE;
  picture.eps ??= async (x, t) => {
    if (picture.from < 1) return (await included("clothes")).eps(x, t); // of this, there is no recording
    const row = Math.min(rows - 1, Math.floor(((999 - t) * rows) / 1000)), [signal, spread] = partsAt(t);
    return x.map((value, k) => (value - signal * estimates[row * SIZE + k]) / spread);
  };
}

/** Send everything back for the reader, or stop. Only what is in sight moves. */
function press(jumps) {
  if (!jumps && (gesture.moving || gesture.paused)) return gesture.pause();
  if (jumps && gesture.moving && scene.jumps) return; // it jumps
  gesture.stop();
  gesture.stage.scrollIntoView({ block: "nearest" });
  gesture.sendBack(jumps);
}

/** Make the opening work. */
export async function startOpening() {
  const options = { limit: 1.65, every: 9, arrows: true, sampler: "ddim", steps: 100 };
  scene = new Scene($("scene-plane"), options, () => gesture.render());
  gesture = new Gesture("scene", [scene], draw, say);
  $("scene-many").onclick = () => press(false);
  $("scene-one").onclick = () => press(true);
  Object.assign(gesture, { moving: !still, repeats: !still });
  gesture.render();
  const begins = await valuesOf($("scene-source"));
  picture.begin(begins, noiseOf(0, STREAM + 1, SIZE)().slice(-SIZE));
  gesture.passages.push(picture);
  gesture.render();
  const image = $("scene-recording");
  image.decode().then(async () => useRecording(await valuesOf(image)), () => {}); // the scene works without
}
