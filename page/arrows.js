// Section 1: what the arrows are. The scene with other data, and other ways back.

import { $, bind } from "./common.js";
import { viewOf } from "./plane.js";
import { CLOUDS, LIMIT, STD, missed } from "./points.js";
import { Scene } from "./scene.js";

const state = { data: "two moons", steps: 50, sampler: "ddim", straight: false };
export let scene;
let follower = () => {}; // called when the data change

/** Call a function with the data, now and when they change. */
export function followData(call) {
  follower = call;
  call(scene.data);
}

const say = () => ($("arrows-status").textContent = sentence());

function sentence() {
  const { data, phase, place, points } = scene;
  if (!data.length) return "Draw some points in the plane.";
  if (phase === "noising" && scene.moving) return "Noise is added …";
  if (scene.sentence) return scene.sentence;
  if (phase === "noising" || phase === "rest") return "Touch a point to see where it may have come from.";
  if (place || !scene.isComplete) return place ? "The points follow the arrows …" : "Computing …";
  const share = 100 * missed(points.at(0).x, data, STD), count = points.tau.length;
  const name = state.sampler === "ddim" ? "" : `, ${$("arrows-sampler").selectedOptions[0].text}`;
  const verdict = share <= 6 ? "good" : share <= 12 ? "fair" : "poor";
  return `${count} step${count > 1 ? "s" : ""}${name}: ${share.toFixed(0)} % of the points miss the data: ${verdict}.`;
}

function useData(points) {
  scene.useData(points);
  if (points.length) follower(points);
  scene.render();
}

function changed(key) {
  Object.assign(scene.points.options, { sampler: state.sampler, steps: state.steps });
  [scene.straight, scene.isDrawn, scene.then] = [state.straight, state.data === "own", kind()];
  scene.canvas.style.touchAction = scene.isDrawn ? "none" : ""; // a finger draws, and does not scroll
  if (key === "data") {
    if (scene.isDrawn) scene.moveTo(0);
    return useData(scene.isDrawn ? new Float32Array() : CLOUDS[state.data]());
  }
  if (key !== "straight" && scene.points.steps) {
    [scene.phase, scene.points.jumps] = [kind(), kind() === "one"];
    scene.points.sample();
  }
  scene.render();
}

/** One step is a jump. */
const kind = () => (state.steps > 1 ? "many" : "one");

/** Draw a point of data at a place of the canvas. */
function drawPoint({ offsetX, offsetY }) {
  const point = viewOf(scene.canvas, LIMIT).place(offsetX, offsetY).map((v) => Math.min(1, Math.max(-1, v)));
  useData(Float32Array.from([...scene.data, ...point].slice(-800)));
}

/** Make the section work. */
export function startArrows() {
  $("arrows-data").prepend(...Object.keys(CLOUDS).map((name) => new Option(name)));
  scene = new Scene("arrows", { data: CLOUDS[state.data](), limit: LIMIT, every: 15, steps: state.steps, say });
  bind(state, "arrows-", changed);
  const { canvas } = scene, draws = () => scene.isDrawn && !scene.place, chooses = canvas.onpointermove;
  canvas.onpointerdown = (event) => draws() && [canvas.setPointerCapture(event.pointerId), drawPoint(event)];
  canvas.onpointermove = (event) =>
    (draws() && canvas.hasPointerCapture(event.pointerId) ? drawPoint(event) : chooses(event));
  $("arrows-many").onclick = () => scene.press(kind());
  scene.moveTo(0.6);
  scene.choose(88); // which is above the others
}
