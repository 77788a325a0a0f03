// Drawing: the palette, crisp canvases, and what is drawn in a plane.

import { scheme } from "./common.js";
import { LIMIT, density } from "./points.js";

const ROWS = 13; // of arrows
const NAMES = ["ink", "dim", "card", "line", "data", "other", "lit", "arrow"];
const read = () => {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
};
export let colours = read(); // of the style sheet
scheme.addEventListener("change", () => { colours = read(); });

/** How a canvas shows the plane: at(x, y) is where a point lies, in CSS pixels, place(left, top) the
 * inverse. limit: the plane is seen from -limit to limit, upwards. */
export function viewOf({ clientWidth: width, clientHeight: height }, limit = LIMIT) {
  const unit = height / 2 / limit, wide = width / height;
  const at = (x, y) => [width / 2 + x * unit, height / 2 - y * unit];
  const place = (left, top) => [(left - width / 2) / unit, (height / 2 - top) / unit];
  return { width, height, wide, limit, at, place };
}

/** Clear a canvas, crisp at any pixel ratio, and return its view with the context that draws in it. */
export function clear(canvas, limit = LIMIT) {
  const view = viewOf(canvas, limit), { width, height } = view, ratio = devicePixelRatio;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
  const context = canvas.getContext("2d", { alpha: false });
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = colours.card;
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
export function drawLine({ context, at }, places, colour, width = 2, dash = [], alpha = 1) {
  [context.strokeStyle, context.lineWidth, context.globalAlpha] = [colour, width, alpha];
  context.setLineDash(dash);
  context.beginPath();
  for (const place of places) context.lineTo(...at(...place));
  context.stroke();
  context.setLineDash([]);
  context.globalAlpha = 1;
}

export function drawRing({ context, at }, place, radius, colour, width = 2) {
  [context.strokeStyle, context.lineWidth] = [colour, width];
  context.beginPath();
  context.arc(...at(...place), radius, 0, 2 * Math.PI);
  context.stroke();
}

/** Write a word under a place. */
export function drawWord({ context, at }, word, place, colour) {
  const [x, y] = at(...place), style = { font: "600 13px system-ui, sans-serif", textAlign: "center", fillStyle: colour };
  Object.assign(context, style, { lineWidth: 4, strokeStyle: colours.card });
  for (const write of ["strokeText", "fillText"]) context[write](word, x, y + 22);
}

/** Draw the density of x_t as a haze. */
export function drawHaze({ context, width, height, wide, limit }, abar, centres, std, scale = 1) {
  const deviation = Math.sqrt(1 - abar + abar * std ** 2); // of each centre: a cell is at most a third of it
  const rows = Math.round(Math.min(64, Math.max(24, (6 * limit * scale) / deviation)));
  const q = density(rows, abar, centres, std, wide, limit * scale), columns = q.length / rows;
  const largest = q.reduce((a, b) => Math.max(a, b)), image = new ImageData(columns, rows);
  const [haze, ground] = [colours.data, colours.card].map((hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)));
  q.forEach((value, k) => { // opaque, which is faster than to blend
    const share = (0.16 + 0.3 * Math.sqrt(abar)) * Math.sqrt(value / largest); // paler where there is more noise
    for (let c = 0; c < 3; c++) image.data[4 * k + c] = ground[c] + share * (haze[c] - ground[c]);
    image.data[4 * k + 3] = 255;
  });
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d", { alpha: false }).putImageData(image, 0, 0);
  context.drawImage(small, 0, 0, width, height);
}

/** The places of the arrows, over the view. */
export function grid({ wide, limit }) {
  const columns = Math.round(ROWS * wide), places = [];
  for (let row = 0; row < ROWS; row++) {
    for (let k = 0; k < columns; k++) {
      places.push((((k + 0.5) / columns) * 2 - 1) * limit * wide, (((row + 0.5) / ROWS) * 2 - 1) * limit);
    }
  }
  return Float32Array.from(places);
}

/** Draw arrows from `places` along `ways`; those of length `longest` and more fill their cell. */
export function drawArrows({ context, at, height }, places, ways, colour, longest = 2.5, which = () => true) {
  const cell = (0.75 * height) / ROWS;
  [context.strokeStyle, context.lineWidth] = [colour, 1.4];
  context.beginPath();
  for (let k = 0; k < places.length; k += 2) {
    const length = Math.hypot(ways[k], ways[k + 1]), size = cell * Math.min(1, length / longest);
    if (!(length > 0) || !which(k / 2)) continue;
    const angle = Math.atan2(-ways[k + 1], ways[k]), [x, y] = at(places[k], places[k + 1]);
    const [toX, toY] = [x + size * Math.cos(angle), y + size * Math.sin(angle)], head = 0.15 * cell;
    context.moveTo(x, y);
    context.lineTo(toX, toY);
    for (const turn of [2.6, -2.6]) {
      context.moveTo(toX, toY);
      context.lineTo(toX + head * Math.cos(angle + turn), toY + head * Math.sin(angle + turn));
    }
  }
  context.stroke();
}

/** Draw grey images, each a Float32Array or bytes in (C, H, W), in rows of `columns` with a gap. */
export function drawImages(canvas, pixels, [channels, height, width], columns = 1, gap = 2) {
  const size = channels * height * width, count = pixels.length / size, rows = Math.ceil(count / columns);
  canvas.width = columns * (width + gap) - gap;
  canvas.height = rows * (height + gap) - gap;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let k = 0; k < count; k++) {
    for (let at = 0; at < height * width; at++) {
      for (let c = 0; c < 3; c++) {
        image.data[4 * at + c] = pixels[k * size + (channels === 3 ? c : 0) * height * width + at];
      }
      image.data[4 * at + 3] = 255;
    }
    context.putImageData(image, (k % columns) * (width + gap), Math.floor(k / columns) * (height + gap));
  }
}

export const toPixels = (x) => Uint8ClampedArray.from(x, (value) => Math.round((value + 1) * 127.5));
