// A scene: points in the plane dissolve into noise, and come back. One place, from 0 (the data) to 1
// (the noise), is the state of the slider, of the points, and of a picture beside them.

import { $, animate, announce, levelAt } from "./common.js";
import { Passage } from "./passage.js";
import { clear, colours, drawArrows, drawDots, drawHaze, drawLine, drawRing, drawWord, grid, viewOf } from "./plane.js";
import { STD, exactEps, nearest, posterior } from "./points.js";
import { ABAR, between, noiseOf, partsAt } from "./sampler.js";

export const N = 240; // points
const PACE = { rest: 2600, noising: 3500, noise: 800, many: 8000, one: 1200 }; // milliseconds
const START = 0.45; // where there is something to see, for a point that is chosen among the data

export class Scene {
  place = 0;
  phase = "rest"; // or "noising", or on the way back in "many" steps or "one" jump
  then = "many"; // what follows the noise
  moving = false;
  repeats = false;
  waited = 0; // how long the phase lasts, in milliseconds
  chosen = -1; // of the points: whose origins are shown
  pinned = -1; // the same, if no pointer is over another one
  straight = false; // whether a point is shown divided by the sum of the factors of data and noise
  isDrawn = false; // whether a reader draws the data
  #round = 1; // the seed of the noise

  /**
   * prefix: of the ids of its canvas, slider and buttons. data: the cloud of points. limit: of the view,
   * upwards. every: of how many points one shows its path. isFree: whether the way back begins at any
   * place, and leads to the next data; else, it begins at the noise, and the data stay. say(): says what
   * is seen, and returns it. drawBeside(): draws what else there is.
   */
  constructor(prefix, { data, limit, every, steps, say, isFree = false, drawBeside = () => {} }) {
    Object.assign(this, { prefix, limit, every, isFree, drawBeside, say });
    const eps = (x, t) => exactEps(x, ABAR[t], this.data, STD);
    this.points = new Passage(eps, { sampler: "ddim", steps }, () => this.render());
    [this.passages, this.canvas] = [[this.points], this.$("plane")];
    this.useData(data);
    this.#listen();
    this.ask = animate(this.canvas, (passed) => {
      if (this.moving) this.#advance(passed);
      this.#draw();
      return this.moving;
    });
  }

  $(name) {
    return $(`${this.prefix}-${name}`);
  }

  /** Let these points be the data. */
  useData(data) {
    this.data = data;
    const x0 = Float32Array.from({ length: data.length ? 2 * N : 0 }, (_, k) => data[k % data.length]);
    this.points.begin(x0, noiseOf(this.#round, 1, x0.length)());
    this.#colour();
    this.chosen = this.pinned = -1;
    this.phase = this.place ? "noising" : "rest";
  }

  /** Give each point the colour of its origin. */
  #colour() {
    const { data, points: { x0 } } = this;
    this.labels = Array.from({ length: x0.length / 2 }, (_, k) => {
      const { index } = nearest(x0[2 * k], x0[2 * k + 1], data);
      return data.labels?.[index] ?? Number(data[2 * index] > 0);
    });
  }

  // ---- what happens

  /** Whether all are back, or nobody sends them. */
  get isComplete() {
    return this.passages.every((passage) => passage.isComplete);
  }

  /** Begin the way back from where they are, in "many" steps or "one" jump; from the data, by the noise.
   * In the middle of a jump, they are nowhere on the way, so it begins where the jump began. */
  sendBack(kind) {
    this.then = kind;
    if (this.place === 0 || (!this.isFree && this.place < 1)) return this.#go("noising");
    if (this.phase !== kind) {
      if (this.phase === "one") this.place = this.points.from;
      this.phase = kind;
      for (const passage of this.passages) passage.sendBack(this.place, kind === "one");
    }
    this.#go(kind);
  }

  /** Send them back for the reader. Only what is in sight moves. */
  press(kind) {
    this.stop();
    this.canvas.scrollIntoView({ block: "nearest" });
    this.sendBack(kind);
  }

  #go(phase) {
    if (phase === "noising" && this.points.steps) this.#arrive();
    Object.assign(this, { phase, moving: true, waited: 0 });
    this.render();
  }

  /** What is there now are the data, which fresh noise will dissolve; but a jump leads to no data. */
  #arrive() {
    this.#round++;
    for (const passage of this.passages) {
      const isNew = this.isFree && this.phase === "many" && passage.eps && passage.isComplete;
      const x0 = isNew ? passage.at(0).x : passage.x0;
      passage.begin(x0, noiseOf(this.#round, 1, x0.length)());
    }
    this.#colour();
  }

  /** Move to a place. Above the beginning of the way back, there is only the way to the noise. */
  moveTo(place) {
    if (this.isFree && this.points.steps && this.place === 0 && place) this.#arrive();
    else if (this.points.steps && place > this.points.from) {
      for (const passage of this.passages) passage.begin(passage.x0, passage.noise);
    }
    this.place = place;
    if (!this.points.steps) this.phase = place ? "noising" : "rest";
    this.render();
  }

  /** Stop for the reader, who takes over. */
  stop() {
    Object.assign(this, { repeats: false, moving: false });
  }

  /** What happens in some milliseconds. */
  #advance(passed) {
    const { phase, place, repeats } = this;
    this.waited += passed;
    if (phase === "rest") {
      if (this.waited > PACE.rest) this.#go("noising");
    } else if (phase === "noising" && place < 1) {
      this.place = Math.min(1, place + passed / PACE.noising);
      this.waited = 0;
    } else if (phase === "noising") {
      if (this.waited > PACE.noise) this.sendBack(this.then);
    } else if (place) {
      this.place = Math.max(0, place - passed / (phase === "many" ? PACE.many : PACE.one / this.points.from));
      this.waited = 0;
    } else if (!repeats) {
      this.moving = !this.isComplete;
      if (!this.moving) announce(this.say());
    } else if (this.waited > PACE.rest && this.isComplete) this.#go("noising");
    this.render();
  }

  /** Say what is seen, and draw it in the next frame. */
  render() {
    const level = `level ${Math.max(0, Math.round(levelAt(this.place)))}`, slider = this.$("place");
    [slider.value, slider.ariaValueText, this.$("at").textContent] = [1000 * this.place, level, level];
    this.$("many").textContent = this.place && this.isFree ? "Send them back" : "To noise, and back";
    const pause = this.$("pause");
    if (pause) [pause.textContent, pause.ariaLabel] = this.moving ? ["❚❚", "Pause"] : ["►", "Play"];
    this.say();
    this.ask?.();
  }

  // ---- the drawing

  /** In the coordinates of straight paths, a point is divided by this number. */
  #scaleAt(level) {
    const [signal, spread] = partsAt(level);
    return this.straight ? signal + spread : 1;
  }

  #draw() {
    const plane = clear(this.canvas, this.limit), { data, labels, phase, chosen } = this;
    const { x, level } = this.points.at(this.place), [signal, spread] = partsAt(level), abar = signal ** 2;
    const scale = this.#scaleAt(level), scaled = (values, by) => values.map((value) => value * by);
    const isBack = this.points.steps !== null, shrunk = scaled(data, signal / scale), shown = scaled(x, 1 / scale);
    if (data.length) drawHaze(plane, abar, data, 0.045, scale);
    drawDots(plane, shrunk, 1.6, colours.dim, 0.5);
    if ((isBack || chosen >= 0) && this.place && data.length) {
      const places = grid(plane), from = scaled(places, scale), eps = exactEps(from, abar, data, STD);
      const ways = this.straight ? from.map((value, k) => (value - spread * eps[k]) / signal - eps[k]) : scaled(eps, -1);
      drawArrows(plane, places, ways, colours.arrow);
    }
    const colourOf = (label) => (label ? colours.data : colours.other);
    if (isBack && phase === "many") {
      for (let k = 0; k < labels.length; k += this.every) {
        const way = [...this.#path(k, level), shown.subarray(2 * k, 2 * k + 2)];
        drawLine(plane, way, colourOf(labels[k]), 1.2, [], 0.55);
      }
    }
    for (const label of [0, 1]) drawDots(plane, shown, 3.2, colourOf(label), 0.9, (k) => labels[k] === label);
    if (chosen >= 0 && phase !== "one") {
      drawOrigins(plane, shown.subarray(2 * chosen, 2 * chosen + 2), this.weightsOf(chosen), shrunk);
    }
    const lowest = Math.min(...shrunk.filter((_, k) => k % 2));
    if (!data.length) drawWord(plane, "draw some points here", [0, 0], colours.lit);
    else if (this.place > 0.2 && lowest < -0.1) drawWord(plane, "the data, shrunk", [0, lowest], colours.dim);
    this.drawBeside();
  }

  /** The places of point k on its way back, above a level. DDIM moves it smoothly between two steps. */
  #path(k, level) {
    const { steps, options } = this.points, own = (values) => values.subarray(2 * k, 2 * k + 2), places = [];
    const parts = options.sampler === "ddim" && steps.length < 60 ? 10 : 1;
    steps.filter(({ t }) => t > level).forEach(({ t, x, x0 }, i) => {
      const end = Math.max(level, steps[i + 1]?.t ?? level);
      for (let part = 0; part < parts; part++) {
        const middle = t + ((end - t) * part) / parts, scale = this.#scaleAt(middle);
        places.push(Array.from(between({ t, x: own(x), x0: own(x0) }, middle), (value) => value / scale));
      }
    });
    return places;
  }

  // ---- the reader

  /** The probabilities of the origins of point k. */
  weightsOf(k) {
    const { x, level } = this.points.at(this.place), [signal] = partsAt(level);
    return posterior(x[2 * k], x[2 * k + 1], signal ** 2, this.data, STD);
  }

  /** What the chosen point shows, or an empty string. */
  get sentence() {
    if (this.chosen < 0 || !this.place || this.phase === "one") return "";
    // as many equal ones have the same entropy
    const n = Math.round(Math.exp(this.weightsOf(this.chosen).reduce((sum, w) => sum - (w && w * Math.log(w)), 0)));
    const all = this.data.length / 2, some = n > 0.9 * all ? "almost any" : `about ${n}`;
    return n > 1 ? `It may have come from ${some} of the ${all} data points. The thicker its line, the more probable an origin is. The ring is their mean: its arrow points there.`
      : "Only one origin is left: its arrow points there.";
  }

  #pointNear({ offsetX, offsetY }) {
    const { x, level } = this.points.at(this.place), scale = this.#scaleAt(level);
    const [right, up] = viewOf(this.canvas, this.limit).place(offsetX, offsetY).map((value) => value * scale);
    const { index, distance } = nearest(right, up, x);
    return distance < 0.3 * scale ? index : -1;
  }

  /** Show the origins of a point from now on; among the data, there is nothing to see. */
  choose(k) {
    if (!this.data.length || (k < 0 && this.pinned < 0)) return;
    this.stop();
    if (this.place === 0 && k >= 0) this.moveTo(START);
    this.chosen = this.pinned = k;
    this.render();
  }

  #listen() {
    const slider = this.$("place"), { canvas } = this;
    let byPointer = false;
    slider.autocomplete = "off";
    slider.onpointerdown = () => { byPointer = true; };
    slider.onkeydown = () => { byPointer = false; };
    slider.oninput = () => {
      this.stop();
      this.moveTo(slider.value / 1000);
    };
    slider.onfocus = () => this.repeats && this.stop();
    slider.onchange = () => {
      if (this.isFree && byPointer && this.place) this.press("many"); // let go
      else announce(this.say());
    };
    for (const kind of ["many", "one"]) {
      this.$(kind)?.addEventListener("click", () => this.press(kind));
    }
    this.$("pause")?.addEventListener("click", () => {
      this.moving = this.repeats = !this.moving;
      this.render();
    });
    canvas.onpointermove = (event) => {
      if (event.pointerType !== "mouse") return;
      const near = this.#pointNear(event);
      this.chosen = near < 0 ? this.pinned : near;
      this.render();
    };
    canvas.onpointerleave = () => {
      this.chosen = this.pinned;
      this.render();
    };
    canvas.onclick = (event) => (this.isDrawn && !this.place) || this.choose(this.#pointNear(event));
    canvas.onkeydown = (event) => {
      const turn = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Escape: 0 }[event.key];
      if (turn === undefined) return;
      event.preventDefault();
      event.stopPropagation(); // Escape would also stop the network
      this.choose(turn ? (Math.max(this.pinned, turn < 0 ? 0 : -1) + turn + N) % N : -1);
      announce(turn ? `Point ${this.pinned + 1} of ${N}. ${this.say()}` : "No point is chosen.");
    };
  }
}

/** Draw lines from a point to the data it may have come from, and a ring at their mean. */
function drawOrigins(plane, point, weights, shrunk) {
  const mean = [0, 0], largest = Math.max(...weights);
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
