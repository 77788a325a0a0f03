// Section 4: a drawing. The gesture of the opening begins with what the reader has drawn.

import { $, captions, onPointer, still } from "./common.js";
import { Passage } from "./passage.js";
import { drawImages, partOf } from "./plane.js";
import { noiseOf } from "./sampler.js";
import { Gesture } from "./timeline.js";

const ENDS = 4, STEPS = 20; // images that come back, and in how many steps
const PLACES = [0.22, 0.39, 0.55, 0.71, 0.89], TRACK_STEPS = 10; // of the small results at the slider
const FIRST = 0.6; // from where the first drawing comes back
const WAIT = 500; // milliseconds without a stroke, after which the drawing comes back
const DISC = "M.06 .5 a.44 .44 0 1 0 .88 0 a.44 .44 0 1 0 -.88 0"; // a face, in a square of side 1
const FEATURES = "M.33 .36 v.1 M.67 .36 v.1 M.28 .62 c.1 .14 .34 .14 .44 0";
const [BROWN, YELLOW] = ["#4a2f14", "#ffd23f"];
const canvas = $("draw"), context = canvas.getContext("2d", { willReadFrequently: true });
const show = captions("drawing");
let network = null, shape = [3, 32, 32], fault = "", pen = BROWN;
let gesture, waiting, before; // before: where the pen was
let track = []; // {canvas, passage} of the small results, which are drawn one after the other

const drawing = new Passage(null, {
  sampler: "ddim", steps: STEPS, scales: true, keepsData: true,
}, (error) => {
  if (error) fail(error);
  else if (drawing.result) fill();
  gesture.render();
});

/** The drawing, as the network sees it: Float32Array (C, H, W). */
function drawn() {
  const [channels, height, width] = shape, area = height * width;
  const { data } = context.getImageData(0, 0, width, height);
  return Float32Array.from({ length: channels * area }, (_, k) => {
    const i = 4 * (k % area), grey = 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
    return (channels === 3 ? data[i + Math.floor(k / area)] : grey) / 127.5 - 1;
  });
}

// ---- what changes it

export function fail(error) {
  fault = error.message;
  gesture.render();
}

/** Another drawing: nothing has come back from it. */
function restart() {
  const x0 = drawn(), data = Float32Array.from({ length: ENDS * x0.length }, (_, k) => x0[k % x0.length]);
  drawing.begin(data, noiseOf(gesture.round++, ENDS, x0.length)());
  for (const { passage, canvas } of track) {
    passage.begin(x0, noiseOf(1, 1, x0.length)());
    canvas.classList.add("old");
  }
  gesture.stop();
  gesture.moveTo(0);
}

/** Send the drawing back from where the reader let go the last time. */
function comeBack() {
  if (!network) return;
  gesture.moveTo(drawing.from ?? FIRST);
  gesture.sendBack();
  if (still) gesture.finish();
}

/** Draw the next small result that this drawing has not. */
function fill() {
  const next = track.findIndex(({ passage }) => !passage.steps);
  if (next >= 0) track[next].passage.sendBack(PLACES[next]);
}

/** Draw a line from where the pen was. */
function paint({ offsetX, offsetY }) {
  const scale = canvas.width / canvas.clientWidth, [x, y] = [scale * offsetX, scale * offsetY];
  const strokeStyle = shape[0] === 1 ? "#b4b4b4" : pen;
  Object.assign(context, { strokeStyle, lineCap: "round", lineWidth: canvas.width / 11 });
  context.beginPath();
  context.moveTo(...before ?? [x, y]);
  context.lineTo(x + 0.01, y);
  context.stroke();
  before = [x, y];
  restart();
}

function clear() {
  [, canvas.height, canvas.width] = shape;
  context.fillStyle = shape[0] === 1 ? "#000000" : "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (const { canvas } of track) canvas.width += 0; // clears it
  restart();
}

function drawFace() {
  context.scale(canvas.width, canvas.height);
  Object.assign(context, { fillStyle: YELLOW, strokeStyle: BROWN, lineCap: "round", lineWidth: 0.08 });
  context.fill(new Path2D(DISC));
  context.stroke(new Path2D(FEATURES));
  context.resetTransform();
  restart();
}

/** The network that draws: that of the emoji, or the reader's, which begins with an empty sheet. */
export function useNetwork(opened) {
  [network, shape, fault] = [opened, opened.shape, ""];
  const passages = [drawing, ...track.map(({ passage }) => passage)], { betas } = network;
  for (const passage of passages) passage.use((x, t) => opened.eps(x, t), { betas });
  $("draw-pens").hidden = shape[0] === 1;
  if (network.kinds) restart();
  else clear();
  gesture.whenSeen(comeBack);
}

// ---- what shows it

function say() {
  const { place, isBack, hasCome } = gesture;
  if (fault) return show("fault", { fault });
  if (!isBack) return show(!place ? "draw" : network ? "noising" : "wait");
  return show(hasCome ? "done" : "back");
}

function draw() {
  const { place, isBack } = gesture, { x } = drawing.at(place);
  drawImages($("draw-ends"), x, shape, 2, 1);
  $("draw-ends").classList.toggle("old", !isBack && !place);
  $("draw-noised").hidden = isBack || !place;
  if (!isBack && place) drawImages($("draw-noised"), partOf(x, 0, ENDS), shape);
}

/** A small result below the slider, which is a place to come back from. */
function addSmall(place) {
  const its = $("drawing-track").appendChild(document.createElement("canvas"));
  its.className = "pixels old";
  its.style.left = `${100 * place}%`;
  its.onclick = () => {
    gesture.moveTo(place);
    gesture.letGo();
  };
  const passage = new Passage(null, { steps: TRACK_STEPS }, (error) => {
    if (error) return fail(error);
    if (!passage.result) return;
    drawImages(its, passage.result, shape);
    its.classList.remove("old");
    fill();
  });
  return { canvas: its, passage };
}

/** Make the section work. Returns its timeline. */
export function startDrawing() {
  gesture = new Gesture("drawing", [drawing], draw, say, true);
  gesture.letGo = () => network && gesture.place && gesture.sendBack();
  track = PLACES.map(addSmall);
  for (const button of $("draw-pens").children) {
    button.style.background = button.value;
    button.onclick = () => {
      pen = button.value;
      for (const other of $("draw-pens").children) other.ariaPressed = String(other === button);
    };
  }
  $("draw-clear").onclick = clear;
  onPointer(canvas, {
    scrolls: false,
    press(event) {
      clearTimeout(waiting);
      before = null;
      paint(event);
    },
    drag: paint,
    release() { waiting = setTimeout(comeBack, WAIT); },
  });
  clear();
  drawFace();
  return gesture;
}
