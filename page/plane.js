// Drawing: the palette, crisp canvases, and what is drawn in a plane.

const style = getComputedStyle(document.documentElement);
const NAMES = ["ink", "dim", "page", "data", "other", "lit", "arrow"]; // as in page.css
export const colours = Object.fromEntries(
  NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));

/** Clear a canvas, crisp at any pixel ratio, and return how it shows the plane, upwards from -limit
 * to limit: at(x, y) is a point in CSS pixels, and place({offsetX, offsetY}) where one points. */
export function clear(canvas, limit) {
  const { clientWidth: width, clientHeight: height } = canvas, ratio = devicePixelRatio;
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  const context = canvas.getContext("2d", { alpha: false }), unit = height / 2 / limit;
  context.scale(ratio, ratio);
  context.fillStyle = colours.page;
  context.fillRect(0, 0, width, height);
  context.lineCap = context.lineJoin = "round";
  const at = (x, y) => [width / 2 + x * unit, height / 2 - y * unit];
  const clip = (value, end) => Math.max(-end, Math.min(end, value));
  const inside = (value, end) => clip(value - end / 2, 0.46 * end) / unit;
  const place = ({ offsetX, offsetY }) => [inside(offsetX, width), -inside(offsetY, height)];
  return { context, width, height, unit, at, place };
}

/** Draw points as dots. radius: in pixels. */
export function drawDots({ context, at }, points, radius, colour, alpha = 1) {
  [context.fillStyle, context.globalAlpha] = [colour, alpha];
  context.beginPath();
  for (let k = 0; k < points.length; k += 2) {
    const [x, y] = at(points[k], points[k + 1]);
    context.moveTo(x + radius, y);
    context.arc(x, y, radius, 0, 2 * Math.PI);
  }
  context.fill();
  context.globalAlpha = 1;
}

/** Draw lines, each of which goes through places of the plane. */
export function drawLines({ context, at }, lines, colour, width = 2, alpha = 1) {
  [context.strokeStyle, context.lineWidth, context.globalAlpha] = [colour, width, alpha];
  context.beginPath();
  for (const places of lines) {
    for (const [k, place] of places.entries()) {
      if (k) context.lineTo(...at(...place));
      else context.moveTo(...at(...place));
    }
  }
  context.stroke();
  context.globalAlpha = 1;
}

export function drawRing({ context, at }, place, radius, colour, width = 2) {
  [context.strokeStyle, context.lineWidth] = [colour, width];
  context.beginPath();
  context.arc(...at(...place), radius, 0, 2 * Math.PI);
  context.stroke();
}

/** Draw lines from a place to the points that it may have come from, with these probabilities. */
export function drawOrigins(view, place, points, weights, small) {
  const least = 0.05 * Math.max(...weights);
  weights.forEach((weight, m) => {
    const origin = points.slice(2 * m, 2 * m + 2), size = Math.sqrt(weight) * small;
    if (weight < least) return;
    drawLines(view, [[place, origin]], colours.lit, small / 2 + 4 * size, 0.15 + 0.6 * weight);
    drawDots(view, origin, 1.5 * small + 4 * size, colours.lit, 0.8);
  });
}

/** The places of so many rows of arrows over the view, from the top left. */
export function grid({ width, height, unit }, rows) {
  const columns = Math.round((rows * width) / height), cell = height / rows / unit;
  return Float32Array.from({ length: 2 * rows * columns }, (_, i) => {
    const k = i >> 1, column = k % columns, row = Math.floor(k / columns);
    return cell * (i % 2 ? (rows - 1) / 2 - row : column - (columns - 1) / 2);
  });
}

/** Draw an arrow between two places of the plane, which ends `gap` pixels before the second one. */
export function drawArrow(view, from, to, colour, width, { gap } = {}) {
  drawLines(view, [arrow(view, from, to, 4 * width, gap)], colour, width);
}

/** The line of an arrow. head: its length, and gap: that at the end, in pixels. */
function arrow(view, from, to, head, gap = 0) {
  const [right, up] = [0, 1].map((i) => to[i] - from[i]), angle = Math.atan2(up, right);
  const go = ([x, y], far, turn = 0) =>
    [x + far * Math.cos(angle + turn), y + far * Math.sin(angle + turn)];
  const length = Math.hypot(right, up) - gap / view.unit, end = go(from, length);
  if (length <= 0) return [];
  const [left, other] = [2.6, -2.6].map((turn) => go(end, head / view.unit, turn));
  return [from, end, left, end, other];
}

/** Draw arrows -eps at places of `grid`, up to a cell long, as opaque as `alphas` say, in tenths. */
export function drawField(view, places, eps, colour, width, alphas) {
  const cell = places[2] - places[0]; // in the plane, as all lengths here
  const lines = Array.from({ length: 11 }, () => []); // of each tenth
  for (let k = 0; k < places.length; k += 2) {
    const size = Math.hypot(eps[k], eps[k + 1]), from = [places[k], places[k + 1]];
    const length = cell * Math.sqrt(Math.min(1, size / 2.5));
    const tenth = Math.round(10 * Math.max(0, Math.min(1, alphas?.[k / 2] ?? 1)));
    if (!size || !tenth) continue;
    const end = from.map((value, i) => value - (eps[k + i] / size) * length);
    lines[tenth].push(arrow(view, from, end, 0.3 * length * view.unit));
  }
  lines.forEach((its, tenth) => drawLines(view, its, colour, width, tenth / 10));
}

/** The image (3, 32, 32) in [-1, 1] that a context has at a place. */
export function readImage(context, left = 0) {
  const { data } = context.getImageData(left, 0, 32, 32);
  const value = (_, k) => data[4 * (k % 1024) + Math.floor(k / 1024)] / 127.5 - 1;
  return Float32Array.from({ length: 3 * 1024 }, value);
}

/** The images that a picture has in a row, (count, 3, 32, 32) in [-1, 1]. */
export function readRow(picture, count, row = 0) {
  const context = new OffscreenCanvas(32 * count, 32).getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, -32 * row);
  const images = Array.from({ length: count }, (_, k) => [...readImage(context, 32 * k)]);
  return Float32Array.from(images.flat());
}

/** Show images (B, C, H, W) in [-1, 1], pixel by pixel, in rows of `columns` with a gap. */
export function drawImages(canvas, x, [channels, height, width], columns = 1, gap = 0) {
  const area = height * width, count = x.length / channels / area;
  const rows = Math.ceil(count / columns);
  [canvas.width, canvas.height] = [columns * (width + gap) - gap, rows * (height + gap) - gap];
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const pixels = Uint8ClampedArray.from(x, (value) => Math.round((value + 1) * 127.5));
  for (let k = 0; k < count; k++) {
    for (let i = 0; i < 4 * area; i++) {
      const c = k * channels + ((i % 4) % channels), at = i >> 2;
      image.data[i] = i % 4 === 3 ? 255 : pixels[c * area + at];
    }
    const [column, row] = [k % columns, Math.floor(k / columns)];
    context.putImageData(image, column * (width + gap), row * (height + gap));
  }
}
