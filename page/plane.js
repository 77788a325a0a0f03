// Drawing: the palette, crisp canvases, and what is drawn in a plane.

import { density } from "./points.js";

const NAMES = ["ink", "dim", "page", "line", "data", "other", "lit", "arrow"];
const style = getComputedStyle(document.documentElement);
export const colours = Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));

const channels = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));

/** How a canvas shows the plane: at(x, y) is where a point lies, in CSS pixels, place(left, top) the
 * inverse. limit: the plane is seen from -limit to limit, upwards. */
export function viewOf({ clientWidth: width, clientHeight: height }, limit) {
  const unit = height / 2 / limit, wide = width / height;
  const at = (x, y) => [width / 2 + x * unit, height / 2 - y * unit];
  const place = (left, top) => [(left - width / 2) / unit, (height / 2 - top) / unit];
  return { width, height, wide, limit, at, place };
}

/** Clear a canvas, crisp at any pixel ratio, and return its view with the context that draws in it. */
export function clear(canvas, limit) {
  const view = viewOf(canvas, limit), { width, height } = view, ratio = devicePixelRatio;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
  const context = canvas.getContext("2d", { alpha: false });
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = colours.page;
  context.fillRect(0, 0, width, height);
  context.lineCap = context.lineJoin = "round";
  return { ...view, context };
}

/** Draw points as dots. radius: in pixels. which: of the points; by default, all. */
export function drawDots({ context, at }, points, radius, colour, alpha = 1, which = () => true) {
  [context.fillStyle, context.globalAlpha] = [colour, alpha];
  context.beginPath();
  for (let k = 0; k < points.length; k += 2) {
    if (!which(k / 2)) continue;
    const [x, y] = at(points[k], points[k + 1]);
    context.moveTo(x + radius, y);
    context.arc(x, y, radius, 0, 2 * Math.PI);
  }
  context.fill();
  context.globalAlpha = 1;
}

/** Draw a line through places of the plane. */
export function drawLine({ context, at }, places, colour, width = 2, alpha = 1) {
  [context.strokeStyle, context.lineWidth, context.globalAlpha] = [colour, width, alpha];
  context.beginPath();
  for (const place of places) context.lineTo(...at(...place));
  context.stroke();
  context.globalAlpha = 1;
}

export function drawRing({ context, at }, place, radius, colour, width = 2) {
  [context.strokeStyle, context.lineWidth] = [colour, width];
  context.beginPath();
  context.arc(...at(...place), radius, 0, 2 * Math.PI);
  context.stroke();
}

const hazes = new Map(); // those of the last frames, because several planes may show the same

/** Draw the density of x_t as a haze. */
export function drawHaze({ context, width, height, wide, limit }, abar, centres, std) {
  const deviation = Math.sqrt(1 - abar + abar * std ** 2); // of each centre: a cell is at most a third of it
  const rows = Math.round(Math.min(64, height / 5, Math.max(24, (6 * limit) / deviation)));
  const name = [rows, wide, limit, abar].join();
  if (hazes.size > 20) hazes.clear();
  if (!hazes.has(name)) hazes.set(name, haze(rows, abar, density(rows, abar, centres, std, wide, limit)));
  context.drawImage(hazes.get(name), 0, 0, width, height);
}

function haze(rows, abar, q) {
  const columns = q.length / rows, largest = q.reduce((a, b) => Math.max(a, b)), image = new ImageData(columns, rows);
  const [blue, ground] = [colours.data, colours.page].map(channels);
  q.forEach((value, k) => { // opaque, which is faster than blending
    const [across, down] = [k % columns / columns, Math.floor(k / columns) / rows].map((at) => (2 * at - 1) ** 2);
    const fade = Math.max(0, 1 - across - down); // towards the edge of the view
    const share = (0.25 + 0.25 * Math.sqrt(abar)) * Math.sqrt(value / largest) * fade; // paler where there is more noise
    for (let c = 0; c < 3; c++) image.data[4 * k + c] = ground[c] + share * (blue[c] - ground[c]);
    image.data[4 * k + 3] = 255;
  });
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d", { alpha: false }).putImageData(image, 0, 0);
  return small;
}

/** The places of so many rows of arrows over the view, from the top left. */
export function grid({ wide, limit }, rows) {
  const columns = Math.round(rows * wide), places = [];
  for (let row = 0; row < rows; row++) {
    for (let k = 0; k < columns; k++) {
      places.push((((k + 0.5) / columns) * 2 - 1) * limit * wide, (1 - ((row + 0.5) / rows) * 2) * limit);
    }
  }
  return Float32Array.from(places);
}

/** Add an arrow between two places in pixels to the path. */
function traceArrow(context, [x, y], [toX, toY], head) {
  const angle = Math.atan2(toY - y, toX - x);
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  for (const turn of [2.6, -2.6]) {
    context.moveTo(toX, toY);
    context.lineTo(toX + head * Math.cos(angle + turn), toY + head * Math.sin(angle + turn));
  }
}

/** Draw an arrow between two places of the plane, which ends `gap` pixels before the second one. */
export function drawArrow({ context, at }, from, to, colour, width, gap) {
  const [x, y] = at(...from), [toX, toY] = at(...to), share = 1 - gap / Math.hypot(toX - x, toY - y);
  if (!(share > 0)) return;
  [context.strokeStyle, context.lineWidth] = [colour, width];
  context.beginPath();
  traceArrow(context, [x, y], [x + share * (toX - x), y + share * (toY - y)], 4 * width);
  context.stroke();
}

/** Draw arrows from `places` along `ways`, as opaque as alpha(k) says; those of length 2.5 and more are `cell` pixels long. */
export function drawArrows({ context, at }, places, ways, colour, cell, { width = 1.4, alpha = () => 1 } = {}) {
  [context.strokeStyle, context.lineWidth] = [colour, width];
  for (let k = 0; k < places.length; k += 2) {
    const size = cell * Math.min(1 / Math.hypot(ways[k], ways[k + 1]), 1 / 2.5), [x, y] = at(places[k], places[k + 1]);
    context.globalAlpha = alpha(k / 2);
    if (!Number.isFinite(size) || context.globalAlpha < 0.03) continue;
    context.beginPath();
    traceArrow(context, [x, y], [x + size * ways[k], y - size * ways[k + 1]], 0.15 * cell);
    context.stroke();
  }
  context.globalAlpha = 1;
}

/** Show images, each a Float32Array in (C, H, W) and [-1, 1], pixel by pixel, in rows of `columns` with a gap. */
export function drawImages(canvas, x, [channels, height, width], columns = 1, gap = 0) {
  const area = height * width, count = x.length / channels / area, pixels = toPixels(x);
  const [across, down] = [columns * (width + gap) - gap, Math.ceil(count / columns) * (height + gap) - gap];
  if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let k = 0; k < count; k++) {
    for (let at = 0; at < area; at++) {
      for (let c = 0; c < 3; c++) image.data[4 * at + c] = pixels[(k * channels + (c % channels)) * area + at];
      image.data[4 * at + 3] = 255;
    }
    context.putImageData(image, (k % columns) * (width + gap), Math.floor(k / columns) * (height + gap));
  }
}

/** The pictures of a row of an image, each 32 x 32 pixels in colour, as drawImages takes them. */
export function rowOf(image, row) {
  const width = image.naturalWidth, context = new OffscreenCanvas(width, 32).getContext("2d");
  context.drawImage(image, 0, -32 * row);
  const { data } = context.getImageData(0, 0, width, 32);
  return Float32Array.from({ length: 96 * width }, (_, i) => {
    const k = Math.floor(i / 3072), c = (i >> 10) % 3, y = (i >> 5) % 32;
    return data[4 * (y * width + 32 * k + (i % 32)) + c] / 127.5 - 1;
  });
}

/** Show a picture's steps and its result, from left to right: x_t, and below it the guess. count: of the
 * pictures that the steps have, of which k is shown. columns: steps that are shown, of `total`, with the result. */
export function drawFilm(canvas, steps, { k, count, shape, total, columns = 11 }) {
  const size = shape[0] * shape[1] * shape[2], film = new Float32Array(2 * columns * size).fill(-0.8);
  for (let column = 0; column < columns; column++) {
    const step = steps[Math.round((column * (total - 1)) / (columns - 1))];
    ["x", "x0"].forEach((key, row) => step && film.set(partOf(step[key], k, count), (row * columns + column) * size));
  }
  drawImages(canvas, film, shape, columns, 1);
}

/** Picture k of `count`. */
export const partOf = (x, k, count) => x.subarray((k * x.length) / count, ((k + 1) * x.length) / count);

/** Frame picture k of a grid, by the style sheet. */
export function frame(element, k, columns, rows) {
  const style = { across: columns, down: rows, column: k % columns, row: Math.floor(k / columns) };
  for (const [name, value] of Object.entries(style)) element.style.setProperty(`--${name}`, value);
}

/** The picture of a grid that a pointer is at. */
export function pictureAt({ clientX, clientY }, grid, columns, rows) {
  const { left, top, width, height } = grid.getBoundingClientRect();
  const [column, row] = [(columns * (clientX - left)) / width, (rows * (clientY - top)) / height];
  return Math.min(columns - 1, Math.max(0, Math.floor(column))) + columns * Math.min(rows - 1, Math.max(0, Math.floor(row)));
}

const toPixels = (x) => Uint8ClampedArray.from(x, (value) => Math.round((value + 1) * 127.5));
