// The opening: pictures dissolve into noise, and the network of the emoji draws new ones.

import { $, LOADING, captions, still } from "./common.js";
import { Passage } from "./passage.js";
import { drawImages, readRow } from "./plane.js";
import { epsFrom, guided, noiseOf } from "./sampler.js";
import { Gesture } from "./timeline.js";

const COUNT = 12, SHAPE = [3, 32, 32], SIZE = 3072, STEPS = 10, GUIDANCE = 1;
const show = captions("scene");
// The rows of recorded.webp, by docs/make_figures.py: first the twelve pictures at the beginning, and
// then the estimates in each step of the first way back, which needs no network.
let gesture, rows = [];
const pictures = new Passage(null, { steps: STEPS, recorded });

/** What takes the place of the network on the first way back, which begins at the noise. */
function recorded(place) {
  if (!rows.length || place < 1 || gesture.round > 1) return null;
  return (x, t) => epsFrom(x, rows[1 + pictures.levels.indexOf(t)], t);
}

/** Let the network draw, in each place what the recording has there. */
function useNetwork(network) {
  const kindOf = (_, k) => network.kinds[(k + Math.floor(k / 6) + 1) % 3];
  pictures.use(guided(network, Array.from({ length: COUNT }, kindOf), GUIDANCE));
  gesture.render();
}

function say() {
  const { place, isBack, move, fault } = gesture;
  $("scene-play").textContent = move ? "Stop" : place ? "Remove the noise" : "Play";
  if (pictures.isWaiting) return show("missing", { text: fault || LOADING });
  if (!isBack) return show(!place ? "clean" : place < 1 ? "noising" : "noise");
  return show(place ? "back" : "new");
}

function draw() {
  const columns = innerWidth < 736 ? 4 : 6;
  drawImages($("scene-pictures"), pictures.at(gesture.place).x, SHAPE, columns, 1);
}

/** Make the opening work, with noise if there is no recording. Returns its timeline. */
export function startOpening(recording) {
  const readAll = (_, row) => readRow(recording, COUNT, row);
  rows = Array.from({ length: (recording?.height ?? 0) / 32 }, readAll);
  pictures.begin(rows[0] ?? null, noiseOf(0, COUNT, SIZE));
  gesture = new Gesture("scene", [pictures], { draw, say, useNetwork });
  $("scene-play").onclick = () => {
    if (gesture.move) return gesture.stop();
    gesture.stage.scrollIntoView({ block: "nearest" }); // only what is in sight moves
    gesture.letGo();
  };
  gesture.moveTo(recording ? 0 : 1);
  if (!still) gesture.letGo();
  return gesture;
}
