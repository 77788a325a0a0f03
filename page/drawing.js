// Section 4: a drawing. The gesture of the opening begins with what the reader has drawn.

import { $, LOADING, captions, onChoice, onPointer } from "./common.js";
import { Passage } from "./passage.js";
import { drawImages, readImage } from "./plane.js";
import { guided, noiseOf } from "./sampler.js";
import { Gesture } from "./timeline.js";

const SHAPE = [3, 32, 32];
const ENDS = 4, STEPS = 12, GUIDANCE = 1; // images that come back; the last one with a word
const FIRST = 0.604, TOLD = 0.75; // of its own ways back, and with a word; no slider is at 0.604
const WAIT = 1500; // milliseconds without a stroke, after which the drawing comes back
const canvas = $("draw"), context = canvas.getContext("2d", { willReadFrequently: true });
const show = captions("drawing");
let gesture, pause, network = null, word = ""; // the number of its class in `kinds`, or nothing
let colour = "#4a2f14", before; // of the pen, and where it was
const drawing = new Passage(null, { steps: STEPS, keepsData: true });

/** Take the drawing as it is now. Nothing has come back from it. */
function restart() {
  const x0 = readImage(context), { length } = x0;
  const copies = Float32Array.from({ length: ENDS * length }, (_, k) => x0[k % length]);
  drawing.begin(copies, noiseOf(gesture.round++, ENDS, length));
  gesture.stop();
  gesture.moveTo(0);
}

/** Send the drawing back by itself, from where the reader let go before. */
function comeBack() {
  gesture.moveTo(drawing.from ?? FIRST);
  gesture.comeBack();
}

/** Draw a line from where the pen was. */
function paint({ offsetX, offsetY }) {
  const end = [offsetX, offsetY].map((value) => (32 * value) / canvas.clientWidth);
  Object.assign(context, { strokeStyle: colour, lineCap: "round", lineWidth: 3 });
  context.stroke(new Path2D(`M${before ?? end}L${[end[0] + 0.01, end[1]]}`));
  before = end;
  restart();
}

function clear() {
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, 32, 32);
  restart();
}

function useNetwork(opened) {
  network = opened;
  const y = word && Array(ENDS).fill(network.kinds[word]);
  drawing.use(y ? guided(network, y, GUIDANCE) : network.eps);
  gesture.render();
}

function say() {
  const { place, isBack, hasCome, fault } = gesture;
  if (fault || drawing.isWaiting) return show("missing", { text: fault || LOADING });
  if (!isBack) return show(place ? "noising" : "draw");
  return show(hasCome ? "done" : "back", { from: Math.round(100 * drawing.from) });
}

function draw() {
  const { place, isBack } = gesture, { x } = drawing.at(place);
  drawImages($("draw-ends"), x, SHAPE, 2, 1);
  $("draw-ends").classList.toggle("old", !isBack && !place);
}

/** Make the section work, with a smiley of recorded.webp if there is one. Returns its timeline. */
export function startDrawing(recording) {
  gesture = new Gesture("drawing", [drawing], { draw, say, useNetwork, startsAnew: true });
  for (const pen of $("draw-pens").children) pen.style.background = pen.value;
  onChoice("draw-pens", (value) => { colour = value; });
  $("draw-clear").onclick = clear;
  onChoice("draw-words", (value) => {
    word = value;
    if (network) useNetwork(network);
    gesture.moveTo(word && drawing.from === FIRST ? TOLD : drawing.from ?? FIRST);
    gesture.comeBack();
  });
  onPointer(canvas, {
    press(event) {
      clearTimeout(pause);
      before = null;
      paint(event);
    },
    drag: paint,
    release: () => { pause = setTimeout(comeBack, WAIT); },
  });
  clear();
  if (recording) context.drawImage(recording, 96, 0, 32, 32, 0, 0, 32, 32);
  if (recording) restart();
  gesture.hold(0, comeBack, 0.7);
  return gesture;
}
