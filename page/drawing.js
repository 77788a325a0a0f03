// Section 5: a drawing. The gesture of the opening begins with what the reader has drawn.

import { $, Owner, pause, still, whenNear } from "./common.js";
import { Gesture } from "./gesture.js";
import { included } from "./networks.js";
import { Passage } from "./passage.js";
import { drawImages, partOf } from "./plane.js";
import { noiseOf, qSample, reverse } from "./sampler.js";

const ENDS = 4, STEPS = 20; // images that come back, and in how many steps
const LEVELS = [50, 150, 300, 500, 800], TRACK_STEPS = 10; // of the results along the slider, of 1000
const FIRST = 0.6; // from where the first drawing comes back
const WAIT = 500; // milliseconds without a stroke, after which the drawing comes back
const DISC = "M.06 .5 a.44 .44 0 1 0 .88 0 a.44 .44 0 1 0 -.88 0", FEATURES = "M.33 .36 v.1 M.67 .36 v.1 M.28 .62 c.1 .14 .34 .14 .44 0"; // of a face, in a square of side 1
const PENS = ["#4a2f14", "#e5383b", "#ff8c1a", "#ffd23f", "#3fa34d", "#2f7de1", "#ffffff"];
const canvas = $("draw"), context = canvas.getContext("2d", { willReadFrequently: true });
const state = { network: null, shape: [3, 32, 32], before: null, fault: "", isNear: false }; // before: where the pen was
const track = new Owner();
let waiting;
export let gesture;
export const drawing = new Passage(null, { sampler: "ddim", steps: STEPS, scales: true, keepsData: true }, (error) => {
  if (error) fail(error);
  gesture.render();
});

/** The drawing, as the network sees it: Float32Array (C, H, W). */
export function drawn() {
  const [channels, height, width] = state.shape, area = height * width;
  const { data } = context.getImageData(0, 0, width, height);
  return Float32Array.from({ length: channels * area }, (_, k) => {
    const at = 4 * (k % area), grey = 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];
    return (channels === 3 ? data[at + Math.floor(k / area)] : grey) / 127.5 - 1;
  });
}

// ---- what changes it

function fail(error) {
  state.fault = error.message.split("\n")[0];
  say();
}

/** Another drawing: nothing has come back from it. */
function restart() {
  const x0 = drawn(), data = new Float32Array(ENDS * x0.length);
  for (let k = 0; k < ENDS; k++) data.set(x0, k * x0.length);
  drawing.begin(data, noiseOf(gesture.round++, ENDS, x0.length)());
  track.stop();
  gesture.stop();
  gesture.moveTo(0);
  for (const level of LEVELS) $(`track-${level}`).classList.add("old");
}

/** Send the drawing back from where the reader let go the last time, and fill the track. */
function comeBack() {
  if (!drawing.eps) return;
  gesture.moveTo(drawing.from);
  gesture.sendBack();
  if (still) gesture.finish();
  track.start(fillTrack).catch(fail);
}

/** Draw what comes back from each of the levels. */
async function fillTrack(run) {
  const { network } = state, { betas, shape, size } = network, x0 = drawn(), noise = noiseOf(1, 1, size)();
  for (const level of LEVELS) {
    while (!gesture.isComplete && !run.stopped) await pause(100);
    const t = Math.round((level / 1000) * betas.length), xT = qSample(x0, t, noise, drawing.abars);
    const options = { sampler: "dpm-solver++", steps: Math.min(TRACK_STEPS, t + 1) };
    let last;
    for await (last of reverse(drawing.eps, () => xT, betas.slice(0, t + 1), options)) {
      if (run.stopped) return;
    }
    drawImages($(`track-${level}`), last.x0, shape);
    $(`track-${level}`).classList.remove("old");
  }
}

/** Draw a line from where the pen was. */
function paint(x, y) {
  const isGrey = state.shape[0] === 1;
  Object.assign(context, { strokeStyle: isGrey ? "#b4b4b4" : PENS[$("draw-pen").value], lineCap: "round", lineWidth: canvas.width / 11 });
  context.beginPath();
  context.moveTo(...state.before ?? [x, y]);
  context.lineTo(x + 0.01, y);
  context.stroke();
  state.before = [x, y];
  restart();
}

function clear() {
  [, canvas.height, canvas.width] = state.shape;
  context.fillStyle = state.shape[0] === 1 ? "#000000" : "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  drawing.from = FIRST;
  for (const level of LEVELS) $(`track-${level}`).width += 0; // clears it
  restart();
}

/** The network that draws: that of the emoji, which can be waited for, or the reader's. */
export function useNetwork(network) {
  const { shape, betas, name, variance } = network;
  Object.assign(state, { network, shape, fault: "" });
  drawing.use((x, t) => network.eps(x, t), { betas, variance });
  $("draw-pen").disabled = shape[0] === 1;
  if (name === "emoji.onnx") restart();
  else clear();
  gesture.begun = false;
  begin();
}

/** When it will soon be seen, the network is opened, and the first drawing comes back. */
function begin() {
  if (!state.isNear || gesture.begun) return;
  if (!state.network) return included("emoji").then((network) => state.network ?? useNetwork(network), fail);
  comeBack();
  gesture.begun = true;
}

// ---- what shows it

function say() {
  const { place, isBack } = gesture;
  const text = state.fault || (!isBack && !place ? "Draw with your finger or the mouse."
    : !state.network ? "The network is loading."
    : !isBack ? "Noise is added to four copies of your drawing. Let go, and the network removes it."
    : place || !gesture.isComplete ? "The network removes the noise."
    : "Four results for the noise at the slider. The small pictures show what comes back from less noise, and from more.");
  return ($("drawing-text").textContent = text);
}

function draw() {
  const { shape } = state, { place, isBack } = gesture, { x } = drawing.at(place);
  drawImages($("draw-ends"), x, shape, 2, 1);
  $("draw-ends").classList.toggle("old", !isBack && !place);
  $("draw-noised").hidden = isBack || !place;
  if (!isBack && place) drawImages($("draw-noised"), partOf(x, 0, ENDS), shape);
}

/** Make the section work. */
export function startDrawing() {
  gesture = new Gesture("drawing", [drawing], draw, say, true);
  $("draw-clear").onclick = clear;
  for (const level of LEVELS) {
    $(`track-${level}`).onclick = () => {
      gesture.stop();
      gesture.moveTo(Math.sqrt(level / 1000));
      gesture.sendBack();
    };
  }
  const move = ({ offsetX, offsetY }) =>
    paint((offsetX * canvas.width) / canvas.clientWidth, (offsetY * canvas.height) / canvas.clientHeight);
  canvas.onpointerdown = (event) => {
    clearTimeout(waiting);
    canvas.setPointerCapture(event.pointerId);
    state.before = null;
    move(event);
  };
  canvas.onpointermove = (event) => canvas.hasPointerCapture(event.pointerId) && move(event);
  canvas.onpointerup = () => { waiting = setTimeout(comeBack, WAIT); };
  clear();
  context.scale(canvas.width, canvas.height); // a face
  Object.assign(context, { fillStyle: PENS[3], strokeStyle: PENS[0], lineCap: "round", lineWidth: 0.08 });
  context.fill(new Path2D(DISC));
  context.stroke(new Path2D(FEATURES));
  context.resetTransform();
  restart();
  gesture.begun = false;
  whenNear("guidance", "drawing-stage", () => {
    state.isNear = true;
    begin();
  });
  const stops = PENS.map((pen, k) => `${pen} 0 ${(100 * (k + 1)) / PENS.length}%`);
  $("draw-pen").style.background = `linear-gradient(to right, ${stops})`;
}
