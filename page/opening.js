// The opening scene: the points, and beside them a picture, which the network of the page draws.

import { $, still } from "./common.js";
import { Passage } from "./passage.js";
import { drawImages, toPixels } from "./plane.js";
import { CLOUDS } from "./points.js";
import { Scene, N } from "./scene.js";
import { noiseOf, partsAt } from "./sampler.js";

const SHAPE = [1, 32, 32], SIZE = 1024;
const STREAM = 1; // the noise of the recording: recorded.webp, by docs/make_figures.py
const picture = new Passage(null, { sampler: "ddim", steps: 40 }, (error) => {
  if (error) fault = ` The network failed: ${error.message.split("\n")[0]}`;
  scene.render();
});
export let scene;
let fault = ""; // of the network that draws the picture
let recordedEps = null;

/** The heading beside the picture, and what to see. */
function captions() {
  const { phase, place, sentence } = scene;
  if (sentence && (phase !== "noising" || !scene.moving)) return ["One point", sentence];
  if (phase === "rest") return ["Data", `${N} points that form two moons, one blue and one red, and a picture. A picture is a point, too, but in more dimensions.`];
  if (phase === "noising") {
    return place < 1 ? ["Noise is added", scene.moving ? "Each point is shrunk towards the middle and scattered, until nothing of its place is left. The picture fades in the same way."
      : "Touch a point to see where it may have come from, or send all of them back."]
      : ["Only noise is left", "Nobody can tell where each point was. The way back begins here."];
  }
  if (phase === "one") {
    return ["Back in one jump", scene.points.from < 0.2 ? "With so little noise, few origins are possible, so their mean is almost a data point. Jump from more noise to see the difference."
      : scene.points.from < 0.7 ? "Each point jumps to the mean of its possible origins, which lies between them. From more noise, the means lie farther off, and the picture becomes a blur."
      : `All ${N} points jump to almost the same place, the mean of all their origins. The mean of many points is no moon, and the mean of many pictures is a blur.`];
  }
  if (place) return ["Back in many steps", "Each point follows its arrow a little, towards where it may have come from. Then it asks again: with less noise, fewer origins are possible."];
  return ["They are back", scene.points.from < 0.7 ? "From so little noise, the points come back near to where they were. From more noise, new data come back."
    : "The shape is the same, but each point is at a new place, as the mixed colours show: these are new data, and a new picture."];
}

function say() {
  const [title, words] = captions(), text = words + fault;
  [$("scene-title").textContent, $("scene-text").textContent] = [title, text];
  return `${title}. ${text}`;
}

/** Let the network draw the picture, if it draws such pictures, and else the recording. Without a
 * network, resolves when the one of before is not asked any more. */
export async function useNetwork(opened) {
  await picture.stop();
  fault = "";
  picture.eps = String(opened?.shape) === String(SHAPE) ? (x, t) => opened.eps(x, t) : recordedEps;
  if (!picture.isComplete) picture.sample();
  scene.render();
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

/** Send the picture back by the estimates of a recording, the rows of recorded.webp. */
function useRecording(estimates) {
  const rows = estimates.length / SIZE;
  recordedEps = (x, t) => {
    const row = Math.min(rows - 1, Math.floor(((999 - t) * rows) / 1000)), [signal, spread] = partsAt(t);
    return x.map((value, k) => (value - signal * estimates[row * SIZE + k]) / spread);
  };
  picture.eps ??= recordedEps;
}

/** Make the scene work. */
export async function startScene() {
  scene = new Scene("scene", {
    data: CLOUDS["two moons"](), limit: 1.65, every: 9, steps: 100, isFree: true, say,
    drawBeside: () => picture.x0 && drawImages($("scene-picture"), toPixels(picture.at(scene.place).x), SHAPE),
  });
  Object.assign(scene, { moving: !still, repeats: !still, waited: 2500 });
  scene.render();
  picture.begin(await valuesOf($("scene-source")), noiseOf(0, STREAM + 1, SIZE)().slice(-SIZE));
  scene.passages.push(picture);
  scene.render();
  const image = $("scene-recording");
  image.decode().then(async () => useRecording(await valuesOf(image)), () => {}); // the scene works without
}
