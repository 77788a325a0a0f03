// Section 4: a drawing. The gesture of the opening begins with what the reader has drawn.

import { $, captions, onPointer, still } from "./common.js";
import { Passage } from "./passage.js";
import { drawImages } from "./plane.js";
import { noiseOf } from "./sampler.js";
import { Gesture } from "./timeline.js";

const ENDS = 4, STEPS = 20; // images that come back, and in how many steps
const PLACES = [0.22, 0.39, 0.55, 0.71, 0.89], SMALL_STEPS = 10; // of the small results
const FIRST = 0.6; // from where the first drawing comes back
const WAIT = 500; // milliseconds without a stroke, after which the drawing comes back
const canvas = $("draw"), context = canvas.getContext("2d", { willReadFrequently: true });
const show = captions("drawing"), pens = [...$("draw-pens").children];
let network = null, shape = [3, 32, 32], fault = "", gesture, waiting;
let pen = pens[0], before; // before: where the pen was

const drawing = new Passage(null, { steps: STEPS, scales: true, keepsData: true }, (error) => {
  if (error) fail(error);
  else if (drawing.result) fill();
  gesture.render();
});

const track = PLACES.map((place) => { // the small results, which come one after the other
  const its = $("drawing-track").appendChild(document.createElement("canvas"));
  its.style.left = `${100 * place}%`;
  its.onclick = () => {
    gesture.moveTo(place);
    gesture.letGo();
  };
  const passage = new Passage(null, { steps: SMALL_STEPS }, (error) => {
    if (error) return fail(error);
    if (!passage.result) return;
    drawImages(its, passage.result, shape);
    its.className = "pixels";
    fill();
  });
  return { canvas: its, passage };
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

export function fail(error) {
  fault = error.message;
  gesture.render();
}

/** Another drawing: nothing has come back from it. */
function restart() {
  const x0 = drawn(), { length } = x0;
  const copies = Float32Array.from({ length: ENDS * length }, (_, k) => x0[k % length]);
  drawing.begin(copies, noiseOf(gesture.round++, ENDS, length)());
  for (const { passage, canvas } of track) {
    passage.begin(x0, noiseOf(1, 1, length)());
    canvas.className = "pixels old";
  }
  gesture.stop();
  gesture.moveTo(0);
}

/** Send the drawing back from where the reader let go the last time. */
function comeBack() {
  if (!network) return;
  gesture.moveTo(drawing.from ?? FIRST);
  gesture.sendBack();
  if (still) gesture.place = 0;
}

/** Draw the next small result that is missing. */
function fill() {
  const next = track.findIndex(({ passage }) => !passage.steps);
  if (next >= 0) track[next].passage.sendBack(PLACES[next]);
}

/** Draw a line from where the pen was. */
function paint({ offsetX, offsetY }) {
  const scale = canvas.width / canvas.clientWidth, [x, y] = [scale * offsetX, scale * offsetY];
  context.strokeStyle = shape[0] === 1 ? "#b4b4b4" : pen.value;
  Object.assign(context, { lineCap: "round", lineWidth: canvas.width / 11 });
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
  restart();
}

/** The network that draws: that of the emoji, or the reader's, which begins with an empty sheet. */
export function useNetwork(opened) {
  [network, shape, fault] = [opened, opened.shape, ""];
  for (const { passage } of [{ passage: drawing }, ...track]) {
    passage.use((x, t) => opened.eps(x, t), { betas: network.betas });
  }
  $("draw-pens").hidden = shape[0] === 1;
  if (network.kinds) restart();
  else clear();
  gesture.whenSeen(comeBack);
}

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
  if (!isBack && place) drawImages($("draw-noised"), x.subarray(0, x.length / ENDS), shape);
}

/** Make the section work, with a smiley of the opening. Returns its timeline. */
export function startDrawing() {
  gesture = new Gesture("drawing", [drawing], draw, say, true);
  gesture.letGo = () => network && gesture.place && gesture.sendBack();
  for (const button of pens) {
    button.style.background = button.value;
    button.onclick = () => {
      pen = button;
      for (const other of pens) other.ariaPressed = String(other === pen);
    };
  }
  $("draw-clear").onclick = clear;
  const press = (event) => {
    clearTimeout(waiting);
    before = null;
    paint(event);
  };
  const release = () => { waiting = setTimeout(comeBack, WAIT); };
  onPointer(canvas, { press, drag: paint, release });
  context.drawImage($("recording"), 96, 0, 32, 32, 0, 0, 32, 32);
  restart();
  return gesture;
}
