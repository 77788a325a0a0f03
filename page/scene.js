// The opening scene: points and a picture dissolve into noise, and come back. One place, from 0 (the
// data) to 1 (noise), is the state of the slider, of the points and of the picture.

import { $, Owner, animate, announce, levelAt, still } from "./common.js";
import {
  clear, colours, drawArrows, drawDots, drawHaze, drawImages, drawLine, drawRing, grid, toPixels, viewOf,
} from "./plane.js";
import { CLOUDS, STD, exactEps, nearest, posterior } from "./points.js";
import { BETAS, T, between, noiseOf, partsAt, sampleProgressive } from "./sampler.js";

const LIMIT = 1.8, STEPS = 60, PICTURE_STEPS = 40, SHAPE = [1, 32, 32], SIZE = 1024;
const RECORDED = 7; // which of the recorded pictures this is, whose noise is the recording's
const BY = { // who sends the picture back
  network: "The picture is drawn by the network of this page.",
  recording: "The picture is recorded, until the network of this page is loaded.",
  "": "The picture waits for the network of this page.",
};
const PACE = { rest: 1800, noising: 4500, noise: 800, many: 8000, one: 2200 }; // milliseconds

const data = CLOUDS["two moons"](), N = data.length / 2;
const labelsOf = (x) => Array.from({ length: N }, (_, k) => data.labels[nearest(x[2 * k], x[2 * k + 1], data).index]);
const state = {
  place: 0, phase: "rest", // or "noising", or on the way back in "many" steps or "one" jump
  moving: !still, repeats: !still, waited: 1700, // how long the phase lasts, in milliseconds
  then: "many", // what follows the noise
  from: 1, // where the way back begins
  chosen: -1, pinned: -1, // of the points: whose origins are shown, and go on being shown
};
let round = 0; // how often they came back
// x0 and noise make x on the way to the noise; steps are those of the way back.
let points = { x0: data, noise: noiseOf(1, N, 2)(), steps: null, labels: data.labels };
let picture = { x0: null, noise: noiseOf(0, RECORDED + 1, SIZE)().slice(-SIZE), steps: null, by: "" };
let network = null, recording = null;
let ask; // for a frame
const drawing = new Owner();

/** x_t of what has x0 and noise. */
function noised({ x0, noise }, level) {
  const [signal, spread] = partsAt(level);
  return x0.map((value, k) => signal * value + spread * noise[k]);
}

/** The state at a level: on the way back, the last step that is not below it. */
const stepAt = (steps, level) => steps.findLast(({ t }) => t >= level) ?? steps[0];

// ---- the points

/** The estimate of x_0 in the mean over all that is possible. */
function estimate(x, level) {
  const [signal, noise] = partsAt(level), eps = exactEps(x, signal ** 2, data, STD);
  return x.map((value, k) => (value - noise * eps[k]) / signal);
}

/** The points at a place; on the way back, this takes the steps that are missing. */
export function pointsAt(place) {
  const level = levelAt(place), { steps } = points;
  if (!steps) return noised(points, level);
  if (state.phase === "one") return jumped(steps[0], place);
  while (steps.at(-1).t > Math.max(level, -0.99)) {
    const t = levelAt(state.from * (1 - steps.length / STEPS)), x = between(steps.at(-1), t);
    steps.push({ t, x, x0: t > -0.99 ? estimate(x, t) : x });
  }
  return between(stepAt(steps, level), level);
}

/** On the straight line from a state to its estimate. */
const jumped = ({ x, x0 }, place) => x.map((value, k) => x0[k] + (place / state.from) * (value - x0[k]));

// ---- the picture

/** The picture at a place; on the way back, as far as the network has come. */
export function pictureAt(place) {
  const level = levelAt(place), { steps } = picture;
  if (!steps) return noised(picture, level);
  if (!steps.length) return noised(picture, levelAt(state.from)); // the network has not answered yet
  if (state.phase === "one") return jumped(steps[0], place);
  const last = steps.at(-1), next = last.t < 0 ? -1 : last.t - T / PICTURE_STEPS;
  return between(stepAt(steps, level), Math.max(level, next));
}

/** The network's way back, or the recorded one. */
function sendPictureBack() {
  const t = Math.max(0, Math.round(levelAt(state.from))), x = noised(picture, t), own = picture;
  own.steps = [];
  own.by = network ? "network" : recording ? "recording" : "";
  if (!network) {
    own.steps = recording?.filter((step) => step.t <= t) ?? [];
    return drawing.stop();
  }
  return drawing.start(async (run) => {
    const steps = Math.min(PICTURE_STEPS, t + 1), options = { sampler: "ddim", steps, xT: x };
    try {
      for await (const step of sampleProgressive((...args) => network.eps(...args), null, BETAS.slice(0, t + 1), options)) {
        if (run.stopped) return;
        own.steps.push({ t: step.t, x: step.x, x0: step.x0 });
        if (state.phase === "one") break;
        render();
      }
      own.steps.push({ t: -1, x: own.steps.at(-1).x0, x0: own.steps.at(-1).x0 });
    } catch {
      own.by = ""; // another network was opened
    }
    render();
  });
}

/** Let the page's network draw the picture, if it draws such pictures. */
export function useNetwork(opened) {
  network = String(opened.shape) === String(SHAPE) ? opened : null;
  render();
}

/** Until then, show this recorded way: [{t, x, x0}] of 16 pictures, as pixels. */
export function useRecording(frames) {
  const one = (pixels) => Float32Array.from(pixels.slice(RECORDED * SIZE, (RECORDED + 1) * SIZE), (v) => v / 127.5 - 1);
  recording = frames.map(({ t, x, x0 }) => ({ t, x: one(x), x0: one(x0) }));
  recording.push({ ...recording.at(-1), t: -1, x: recording.at(-1).x0 });
}

// ---- what happens

/** Begin the way back from where they are, in "many" steps or "one" jump; from the data, by the noise. */
export function sendBack(kind) {
  state.then = kind;
  if (state.place === 0) return go("noising");
  if (state.phase !== kind) {
    const x = pointsAt(state.place), level = levelAt(state.place), x0 = estimate(x, level);
    if (points.steps) { // on the other way: it may be left again from here
      const step = picture.steps?.length && stepAt(picture.steps, level);
      split(picture, pictureAt(state.place), step ? step.x0 : picture.x0, level);
      split(points, x, x0, level);
    }
    [state.from, state.phase] = [state.place, kind];
    points.steps = [{ t: level, x, x0 }];
    sendPictureBack();
  }
  go(kind);
}

/** Let x be the noised x0. */
function split(what, x, x0, level) {
  const [signal, spread] = partsAt(level);
  Object.assign(what, { x0, noise: x.map((value, k) => (value - signal * x0[k]) / spread), steps: null });
}

/** What is there now are the data, which fresh noise will dissolve; but a jump leads to no data. */
function arrive() {
  const isJump = state.phase === "one", x0 = isJump ? data : pointsAt(0), { steps } = picture;
  points = { x0, noise: noiseOf(++round, N, 2)(), steps: null, labels: labelsOf(x0) };
  if (!isJump && steps?.at(-1)?.t < 0) picture.x0 = steps.at(-1).x0;
  Object.assign(picture, { noise: noiseOf(round, 1, SIZE)(), steps: null });
  drawing.stop();
}

function go(phase) {
  if (phase === "noising" && points.steps) arrive();
  Object.assign(state, { phase, moving: true, waited: 0 });
  render();
}

/** Move to a place. Above the beginning of the way back, there is only the way to the noise. */
export function moveTo(place) {
  if (points.steps && state.place === 0 && place) arrive();
  else if (points.steps && place > state.from) {
    drawing.stop();
    points.steps = picture.steps = null;
  }
  state.place = place;
  if (!points.steps) state.phase = place ? "noising" : "rest";
  render();
}

/** Whether the picture is back, too, or nobody draws it. */
export const isComplete = () => !picture.by || !picture.steps || picture.steps.at(-1)?.t < 0;

/** What happens in some milliseconds. */
function advance(passed) {
  const { phase, place, repeats } = state;
  state.waited += passed;
  if (phase === "rest") {
    if (state.waited > PACE.rest) go("noising");
  } else if (phase === "noising" && place < 1) {
    state.place = Math.min(1, place + passed / PACE.noising);
    state.waited = 0;
  } else if (phase === "noising") {
    if (state.waited > PACE.noise) sendBack(state.then);
  } else if (place) {
    state.place = Math.max(0, place - passed / (phase === "many" ? PACE.many : PACE.one / state.from));
    state.waited = 0;
    if (!state.place && !repeats) announce(captions()[1]);
  } else if (!repeats) state.moving = !isComplete();
  else if (state.waited > PACE.rest && isComplete()) go("noising");
}

/** Say what is seen, and draw it in the next frame. */
function render() {
  const { place } = state;
  $("scene-place").value = 1000 * place;
  $("scene-at").textContent = `noise level ${Math.max(0, Math.round(levelAt(place)))}`;
  [$("scene-title").textContent, $("scene-text").textContent] = captions();
  $("scene-many").textContent = place ? "Send them back" : "To noise, and back";
  $("scene-by").textContent = points.steps ? BY[picture.by] : "";
  ask();
}

/** Stop for the reader, who takes over. */
export function stop() {
  Object.assign(state, { repeats: false, moving: false });
}

// ---- the drawing

function draw() {
  const plane = clear($("scene-plane"), LIMIT), { place, phase, chosen } = state, level = levelAt(place);
  const [signal] = partsAt(level), abar = signal ** 2, x = pointsAt(place);
  const back = points.steps !== null, shrunk = data.map((value) => signal * value);
  drawHaze(plane, abar, data, 0.045);
  drawDots(plane, shrunk, 1.6, colours.dim, 0.5);
  if (place) {
    const places = grid(plane), eps = exactEps(places, abar, data, STD);
    plane.context.globalAlpha = back ? 1 : 0.35;
    drawArrows(plane, places, eps.map((value) => -value), colours.arrow);
    plane.context.globalAlpha = 1;
  }
  if (back && phase === "many") {
    for (let k = 0; k < N; k += 9) {
      const way = points.steps.filter(({ t }) => t > level).map((step) => [step.x[2 * k], step.x[2 * k + 1]]);
      way.push([x[2 * k], x[2 * k + 1]]);
      drawLine(plane, way, points.labels[k] ? colours.data : colours.other, 1.2, [], 0.55);
    }
  }
  for (const label of [0, 1]) {
    const colour = label ? colours.data : colours.other;
    drawDots(plane, x, 3.2, colour, 0.9, (k) => points.labels[k] === label);
  }
  if (chosen >= 0 && phase !== "one") drawOrigins(plane, x.subarray(2 * chosen, 2 * chosen + 2), abar, shrunk);
  if (picture.x0) drawImages($("scene-picture"), toPixels(pictureAt(place)), SHAPE);
}

/** Lines from a point to the data it may have come from, and a ring at their mean. */
function drawOrigins(plane, point, abar, shrunk) {
  const weights = posterior(...point, abar, data, STD), mean = [0, 0], largest = Math.max(...weights);
  weights.forEach((weight, m) => {
    const origin = [shrunk[2 * m], shrunk[2 * m + 1]];
    mean[0] += weight * origin[0];
    mean[1] += weight * origin[1];
    if (weight > 0.02 * largest) {
      drawLine(plane, [point, origin], colours.lit, 0.4 + 7 * Math.sqrt(weight), [], 0.3 + 0.5 * weight);
    }
  });
  drawLine(plane, [point, mean], colours.ink, 2);
  drawRing(plane, mean, 9, colours.card, 5);
  drawRing(plane, mean, 9, colours.lit, 3);
  drawDots(plane, point, 5.5, colours.ink);
  drawDots(plane, point, 4, colours.lit);
}

/** How many data points a point may have come from: the number of equal ones with the same entropy. */
function originsOf(x, y, abar) {
  const weights = posterior(x, y, abar, data, STD);
  return Math.round(Math.exp(weights.reduce((sum, w) => sum - (w ? w * Math.log(w) : 0), 0)));
}

/** The heading beside the picture, and what to see. */
function captions() {
  const { phase, place, chosen } = state, [signal] = partsAt(levelAt(place));
  if (chosen >= 0 && place && phase !== "one") {
    const x = pointsAt(place), n = originsOf(x[2 * chosen], x[2 * chosen + 1], signal ** 2);
    return ["One point", n > 1
      ? `It may have come from about ${n} of the ${N} data points. The thicker its line, the more likely an origin is. The ring is their mean: its arrow points there.`
      : "Only one origin is left: its arrow points there."];
  }
  if (phase === "rest") return ["Data", `${N} points that form two moons, and a picture of a shoe.`];
  if (phase === "noising") {
    return place < 1 ? ["Noise is added", "The points shrink towards the middle and scatter. The picture fades in the same way."]
      : ["Only noise is left", "Nobody can tell where a point was. Or can one?"];
  }
  if (phase === "one") {
    return ["Back in one jump", "Each point jumps to the mean of all its possible origins. The mean of many points is no moon, and the mean of many pictures is a blur."];
  }
  return place ? ["Back in many steps", "Each point follows its arrow a little, the shrinking is undone a little, and it asks again: with less noise, fewer origins are possible."]
    : ["They are back", "The shape is the same, but each point is at a new place, as the mixed colours show: these are new data."];
}

// ---- the reader

/** The point that is nearest to a place of the canvas, if one is near. */
function pointNear({ offsetX, offsetY }) {
  const { place } = viewOf($("scene-plane"), LIMIT), x = pointsAt(state.place);
  const { index, distance } = nearest(...place(offsetX, offsetY), x);
  return distance < 0.3 ? index : -1;
}

/** Make the scene work. */
export async function startScene() {
  const slider = $("scene-place"), canvas = $("scene-plane");
  let byPointer = false;
  slider.autocomplete = "off";
  slider.onpointerdown = () => { byPointer = true; };
  slider.onkeydown = () => { byPointer = false; };
  slider.oninput = () => {
    stop();
    moveTo(slider.value / 1000);
  };
  slider.onchange = () => byPointer && state.place && sendBack("many"); // let go
  for (const kind of ["many", "one"]) {
    $(`scene-${kind}`).onclick = () => {
      stop();
      sendBack(kind);
    };
  }
  canvas.onpointermove = (event) => {
    if (event.pointerType !== "mouse") return;
    state.chosen = pointNear(event);
    if (state.chosen < 0) state.chosen = state.pinned;
    render();
  };
  canvas.onpointerleave = () => {
    state.chosen = state.pinned;
    render();
  };
  canvas.onclick = (event) => {
    stop();
    state.chosen = state.pinned = pointNear(event);
    if (state.place === 0 && state.pinned >= 0) moveTo(0.45); // where there is something to see
    render();
  };
  canvas.onkeydown = (event) => {
    const turn = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Escape: 0 }[event.key];
    if (turn === undefined) return;
    event.preventDefault();
    stop();
    if (state.place === 0 && turn) moveTo(0.45);
    state.chosen = state.pinned = turn ? (state.pinned + turn + N) % N : -1;
    render();
    announce(captions().join(". "));
  };
  ask = animate(canvas, (passed) => {
    if (state.moving) {
      advance(passed);
      render();
    }
    draw();
    return state.moving;
  });
  const image = $("scene-source");
  await image.decode();
  const context = new OffscreenCanvas(32, 32).getContext("2d");
  context.drawImage(image, 0, 0);
  const { data: bytes } = context.getImageData(0, 0, 32, 32);
  picture.x0 = Float32Array.from({ length: SIZE }, (_, k) => bytes[4 * k] / 127.5 - 1);
  render();
}
