// Section 4: a drawing. The gesture of the opening begins with what the reader has drawn.

import { $, captions, onChoice, onPointer } from "./common.js";
import { Passage } from "./passage.js";
import { drawImages, readImage } from "./plane.js";
import { noiseOf } from "./sampler.js";
import { Gesture } from "./timeline.js";

const ENDS = 4, STEPS = 20; // images that come back, and in how many steps
const FIRST = 0.6; // the highest place from where a drawing comes back by itself
const WAIT = 500; // milliseconds without a stroke, after which the drawing comes back
const canvas = $("draw"), context = canvas.getContext("2d", { willReadFrequently: true });
const show = captions("drawing");
let shape = [3, 32, 32], gesture, pause;
let colour = "#4a2f14"; // of the pen
let before; // where the pen was, if it has drawn
const drawing = new Passage(null, { steps: STEPS, scales: true, keepsData: true });

/** Take the drawing as it is now. Nothing has come back from it. */
function restart() {
  const x0 = readImage(context, shape), { length } = x0;
  const copies = Float32Array.from({ length: ENDS * length }, (_, k) => x0[k % length]);
  drawing.begin(copies, noiseOf(gesture.round++, ENDS, length));
  gesture.stop();
  gesture.moveTo(0);
}

/** Send the drawing back by itself: from where the reader let go, but not as almost anything. */
function comeBack() {
  gesture.moveTo(Math.min(drawing.from ?? 1, FIRST));
  gesture.comeBack();
}

/** Draw a line from where the pen was. */
function paint({ offsetX, offsetY }) {
  const scale = canvas.width / canvas.clientWidth, [x, y] = [scale * offsetX, scale * offsetY];
  context.strokeStyle = shape[0] === 1 ? "#b4b4b4" : colour;
  Object.assign(context, { lineCap: "round", lineWidth: canvas.width / 11 });
  context.stroke(new Path2D(`M${before ?? [x, y]}L${[x + 0.01, y]}`));
  before = [x, y];
  restart();
}

function clear() {
  [, canvas.height, canvas.width] = shape;
  context.fillStyle = shape[0] === 1 ? "#000000" : "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  restart();
}

/** Wait for a network. The drawing can be sent back before it is there. */
function wait() {
  gesture.fault = "";
  drawing.use(null);
  restart();
  gesture.hold(0, comeBack, 0.7);
}

/** Let a network draw. One for pictures of another size begins with an empty sheet. */
function useNetwork(opened) {
  const isOther = String(opened.shape) !== String(shape);
  ({ shape } = opened);
  $("draw-pens").hidden = shape[0] === 1;
  if (isOther) clear();
  if (isOther) gesture.hold(0, comeBack, 0.7);
  drawing.use((x, t) => opened.eps(x, t), { betas: opened.betas });
  gesture.render();
}

function say() {
  const { place, isBack, hasCome, fault } = gesture;
  if (fault || drawing.isWaiting) return show(fault ? "fault" : "wait", { text: fault });
  if (!isBack) return show(place ? "noising" : "draw");
  return show(hasCome ? "done" : "back");
}

function draw() {
  const { place, isBack } = gesture, { x } = drawing.at(place);
  drawImages($("draw-ends"), x, shape, 2, 1);
  $("draw-ends").classList.toggle("old", !isBack && !place);
  $("draw-noised").hidden = isBack || !place;
  if (!isBack && place) drawImages($("draw-noised"), x.subarray(0, x.length / ENDS), shape);
}

/** Make the section work. Returns its timeline; `trace` draws a smiley of recorded.webp. */
export function startDrawing() {
  const letGo = () => gesture.place && gesture.sendBack();
  const trace = (recording) => before || context.drawImage(recording, 96, 0, 32, 32, 0, 0, 32, 32);
  const its = { draw, say, stays: true, letGo, wait, useNetwork, trace };
  gesture = new Gesture("drawing", [drawing], its);
  for (const pen of $("draw-pens").children) pen.style.background = pen.value;
  onChoice("draw-pens", (value) => { colour = value; });
  $("draw-clear").onclick = clear;
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
  return gesture;
}
