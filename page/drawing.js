// Section 4: a drawing, noise, and the network that removes it.

import { $, bind, follow, still } from "./common.js";
import { drawImages, toPixels } from "./plane.js";
import { modelOf, network, reverse, tell, work } from "./reverse.js";
import { noiseOf, qSample } from "./sampler.js";

const ENDS = 4, END_STEPS = 50; // images drawn from one x_t, and the steps to draw them in
const SHIRT = new Path2D("M.34 .1 L.66 .1 .95 .3 .86 .45 .72 .36 .72 .92 .28 .92 .28 .36 .14 .45 .05 .3");
const canvas = $("draw"), context = canvas.getContext("2d", { willReadFrequently: true });
const state = { t: 100, colour: "#ffffff", class: "" };
let place, seed = 0; // of the brush, in pixels; of the next results
let show, noise; // the state in the controls; of x_t, which stays while the slider moves

/** The drawing with noise: x_t of x_0, Float32Array (C, H, W). */
function noised() {
  const [channels, height, width] = network.shape, area = height * width;
  const { data } = context.getImageData(0, 0, width, height);
  const x0 = Float32Array.from({ length: network.size }, (_, k) => {
    const at = 4 * (k % area), grey = 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];
    return (channels === 3 ? data[at + Math.floor(k / area)] : grey) / 127.5 - 1;
  });
  return qSample(x0, state.t, noise, network.betas);
}

/** Show the state. The results belong to the drawing and its noise: with others, they are faint. */
function render() {
  show();
  $("draw-t-value").textContent = `level ${state.t}`;
  if (!network) return;
  const stopped = work.busy ? work.stop() : Promise.resolve();
  stopped.then(() => work.busy || tell(["draw-status"], "Press Denoise.", { passes: true }));
  drawImages($("noised"), toPixels(noised()), network.shape);
  $("ends").style.opacity = 0.3;
}

/** Draw a line from where the brush was. */
function paint(x, y) {
  if (!network) return;
  [context.strokeStyle, context.lineCap] = [state.colour, "round"];
  context.lineWidth = Math.max(1.5, canvas.width / 12);
  context.beginPath();
  context.moveTo(...place ?? [x, y]);
  context.lineTo(x + 0.01, y);
  context.stroke();
  place = [x, y];
  render();
}

/** Fill the drawing with black or white, and draw the next line in the other one. */
function fill(colour = network.shape[0] === 1 ? "#000000" : "#ffffff") {
  context.fillStyle = colour;
  context.fillRect(0, 0, canvas.width, canvas.height);
  state.colour = colour === "#000000" ? "#ffffff" : "#000000";
  render();
}

/** Another network: begin with a shirt. */
export function beginDrawing({ shape: [channels, height, width], size, betas, classes }) {
  noise = noiseOf(1, 1, size)();
  [canvas.height, canvas.width] = [height, width];
  $("ends").width += 0; // clears it
  $("draw-t").max = betas.length - 1;
  state.t = Math.min(state.t, betas.length - 1);
  $("draw-class").replaceChildren(...[...classes, "any"].map((name, k) => new Option(name, k)));
  state.class = String(classes.length);
  for (const id of ["denoise", "draw-clear"]) $(id).disabled = false;
  fill();
  context.fillStyle = channels === 1 ? "#b0b0b0" : "#3a6fd8";
  context.scale(width, height);
  context.fill(SHIRT);
  context.resetTransform();
  render();
  follow($("ends"), (isSeen) => isSeen && !seed && !still && !work.busy && denoise());
}

function denoise() {
  const { betas, shape, size } = network, { t } = state, xT = new Float32Array(ENDS * size), image = noised();
  for (let k = 0; k < ENDS; k++) xT.set(image, k * size);
  const drawNoise = noiseOf(seed++, ENDS, size), model = modelOf(state.class, ENDS, 0);
  const options = { variance: "small", xT, steps: Math.min(END_STEPS, t + 1) }; // "large" would leave grain
  reverse("draw-status", `Four results from level ${t}`, model, drawNoise, betas.slice(0, t + 1), options, ({ x0 }) => {
    drawImages($("ends"), toPixels(x0), shape, 2);
    $("ends").style.opacity = 1;
  });
}

export function startDrawing() {
  show = bind(state, "draw-", (key) => key !== "colour" && render());
  $("denoise").onclick = denoise;
  $("draw-clear").onclick = () => fill();
  const move = ({ offsetX, offsetY }) =>
    paint((offsetX * canvas.width) / canvas.clientWidth, (offsetY * canvas.height) / canvas.clientHeight);
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    place = null;
    move(event);
  };
  canvas.onpointermove = (event) => canvas.hasPointerCapture(event.pointerId) && move(event);
}
