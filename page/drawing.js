// Section 4: a drawing, noise, and the network that removes it.

import { $, bind } from "./common.js";
import { drawImages, toPixels } from "./plane.js";
import { takeResult } from "./images.js";
import { follow, modelOf, network, reverse, tell, work } from "./reverse.js";
import { noiseOf, qSample } from "./sampler.js";

const ENDS = 4, END_STEPS = 50; // images drawn from one x_t, and the steps to draw them in
const SHIRT = [[.34, .1], [.66, .1], [.95, .3], [.86, .45], [.72, .36], [.72, .92], [.28, .92],
  [.28, .36], [.14, .45], [.05, .3]];

const state = { t: 400, brush: "draw", colour: "#ffffff", class: "" };
let place = null; // of the brush, in pixels
let noise; // of x_t, which stays while the slider moves
let marks = null; // what may change, as 0 and 1 for each value of an image, or null for all of it
let seed = 0, show;

const contextOf = (id) => $(id).getContext("2d", { willReadFrequently: true });

/** The noise level: where only a part may change, nothing of that part is kept. */
const level = () => marks ? network.betas.length - 1 : state.t;

/** The drawing as x_0: Float32Array (C, H, W) in [-1, 1]. */
function x0() {
  const [channels, height, width] = network.shape, x0 = new Float32Array(network.size);
  const { data } = contextOf("draw").getImageData(0, 0, width, height);
  for (let at = 0; at < height * width; at++) {
    const [red, green, blue] = data.subarray(4 * at, 4 * at + 3);
    const values = channels === 3 ? [red, green, blue] : [0.299 * red + 0.587 * green + 0.114 * blue];
    values.forEach((value, c) => { x0[c * height * width + at] = value / 127.5 - 1; });
  }
  return x0;
}

const noised = () => qSample(x0(), level(), noise, network.betas);

/** Show the state. The results belong to the drawing and its noise: another one has none yet. */
function render(isNew = true) {
  show();
  for (const id of ["denoise", "draw-clear", "draw-take", "draw-unmark"]) $(id).disabled = !network;
  $("draw-unmark").disabled ||= !marks;
  $("draw-t").disabled = marks !== null;
  $("draw-t-value").textContent = marks ? "all" : state.t;
  $("draw-hint").textContent = marks ? "The marked part is drawn anew, from pure noise; the rest stays." : "";
  if (!network) return;
  drawImages($("noised"), toPixels(noised()), network.shape);
  if (isNew) {
    if (work.busy) work.stop();
    drawImages($("ends"), new Uint8Array(ENDS * network.size).fill(128), network.shape, 2);
  }
}

function paint(x, y) {
  const isMark = state.brush === "mask", from = place ?? [x, y], context = contextOf(isMark ? "mask" : "draw");
  context.strokeStyle = isMark ? "#ff3b30" : state.colour;
  context.lineWidth = Math.max(1.5, network.shape[2] / 12);
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(x + 0.01, y);
  context.stroke();
  place = [x, y];
  if (isMark) {
    const { data } = context.getImageData(0, 0, $("mask").width, $("mask").height), { size, shape } = network;
    marks = Uint8Array.from({ length: size }, (_, k) => data[4 * (k % (shape[1] * shape[2])) + 3] > 127);
  }
  render();
}

function clearMarks() {
  [$("mask").height, $("mask").width] = network.shape.slice(1); // which also clears it
  marks = null;
  render();
}

/** Fill the drawing with a colour, and draw the next line in one that is seen on it. */
function fill(colour) {
  const context = contextOf("draw"), [red, green, blue] = [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16));
  context.fillStyle = colour;
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  state.colour = red + green + blue > 382 ? "#000000" : "#ffffff";
}

/** Another network: begin with a shirt. */
export function beginDrawing({ shape, size, betas, classes }) {
  const [channels, height, width] = shape, isGrey = channels === 1, context = contextOf("draw");
  noise = noiseOf(1, 1, size)();
  [context.canvas.height, context.canvas.width] = [height, width];
  $("draw-t").max = betas.length - 1;
  state.t = Math.min(state.t, betas.length - 1);
  $("draw-class").replaceChildren(...[...classes, "any"].map((name, k) => new Option(name, k)));
  state.class = String(classes.length);
  fill(isGrey ? "#000000" : "#ffffff");
  context.fillStyle = isGrey ? "#b0b0b0" : "#3a6fd8";
  context.beginPath();
  for (const [x, y] of SHIRT) context.lineTo(x * width, y * height);
  context.fill();
  clearMarks();
}

/** Let an image file be the drawing: its middle square. */
export async function useImage(file) {
  try {
    const bitmap = await createImageBitmap(file), side = Math.min(bitmap.width, bitmap.height);
    const context = contextOf("draw"), { width, height } = context.canvas;
    context.imageSmoothingQuality = "high";
    fill("#ffffff");
    context.drawImage(
      bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, width, height,
    );
    render();
    tell(["draw-status"], `${file.name} is now the drawing.`);
  } catch {
    tell(["draw-status"], `${file.name} is not an image that this browser can read.`, { isError: true });
  }
}

function denoise() {
  const t = level(), repeat = (image) => {
    const images = new Float32Array(ENDS * network.size);
    for (let k = 0; k < ENDS; k++) images.set(image, k * network.size);
    return images;
  };
  const drawNoise = noiseOf(seed++, ENDS, network.size), betas = network.betas.slice(0, t + 1), { shape } = network;
  const known = marks && { x0: repeat(x0()), mask: repeat(marks) };
  // eta = 1 is Algorithm 2 with the small variance; in few steps, the large one leaves grain
  const options = { eta: 1, xT: repeat(noised()), steps: Math.min(END_STEPS, t + 1), known };
  const what = `Four ${marks ? "completions" : "results"} from t = ${t}`;
  reverse("draw-status", what, modelOf(state.class, ENDS, 0), drawNoise, betas, options, (step) => {
    drawImages($("ends"), toPixels(step.x0), shape, 2);
  });
}

export function startDrawing() {
  const canvas = $("draw");
  show = bind(state, "draw-", (key) => render(key === "t" || key === "class"));
  $("denoise").onclick = denoise;
  $("draw-clear").onclick = () => {
    fill(network.shape[0] === 1 ? "#000000" : "#ffffff");
    render();
  };
  $("draw-unmark").onclick = clearMarks;
  $("draw-take").onclick = () => {
    const image = takeResult();
    if (image) drawImages(canvas, image, network.shape);
    render();
  };
  $("draw-file").onchange = async ({ target }) => {
    if (network && target.files[0]) await useImage(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  };
  const placeOf = ({ offsetX, offsetY }) =>
    [(offsetX * canvas.width) / canvas.clientWidth, (offsetY * canvas.height) / canvas.clientHeight];
  canvas.onpointerdown = (event) => {
    if (!network) return;
    canvas.setPointerCapture(event.pointerId);
    place = null;
    paint(...placeOf(event));
  };
  canvas.onpointermove = (event) => {
    if (network && canvas.hasPointerCapture(event.pointerId)) paint(...placeOf(event));
  };
  canvas.onkeydown = (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!network || !(move || event.key === " ")) return;
    event.preventDefault();
    const { width, height } = canvas, [x, y] = place ?? [width / 2, height / 2];
    const within = (value, size) => Math.min(size - 0.5, Math.max(0.5, value));
    if (move) place = [within(x + move[0], width), within(y + move[1], height)];
    if (!move || event.shiftKey) paint(...place ?? [x, y]);
  };
  follow(() => render(false));
  render(false);
}
