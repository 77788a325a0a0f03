// The timelines of the sections: what moves by itself, until the reader takes over.

import { $, announce, follow, still } from "./common.js";

const PACE = { noising: 2200, noise: 500, back: 3900 }; // milliseconds

/** How fast it moves at a place: slowly near the data, where most is to be seen; 1 on average. */
const paceAt = (place) => 0.3 + 2.06 * place;

/** A place from 0 to 1, which a slider shows and moves. */
export class Timeline {
  place = 0;
  move = null; // what moves it: a function of the milliseconds since the last frame
  takeOver = () => this.stop(); // when the reader moves the slider
  seen = 0; // the share of the stage that is in sight
  #asked = 0; // the number of the frame that has been asked for, or 0
  #isOld = true; // whether what is drawn is not what there is now
  #before = null; // the time of the last frame, while something moves

  /** name: of its stage and slider. its: draw() draws what is seen, and say() says it and returns
   * it. Some have letGo(), called when the slider is let go, and takeOver(), when it is moved. */
  constructor(name, its) {
    const slider = $(`${name}-place`), stage = $(`${name}-stage`);
    let isHeld = false, touched = null; // where a finger went down
    Object.assign(this, its, { slider, stage, isTouched: () => touched !== null });
    follow(stage, (seen) => {
      this.seen = seen;
      stage.parentElement.classList.toggle("seen", seen >= 0.4);
      this.#ask();
    });
    new ResizeObserver(() => this.#ask(this.#isOld = true)).observe(stage); // draws at first, too
    // A finger may mean to scroll the page. Until it moves along the slider, or is lifted, nothing
    // happens. What moves the slider without a pointer, such as a key, does not let go of it.
    const byKey = (value) => slider.parentElement.classList.toggle("by-key", value);
    slider.onpointerdown = ({ pointerType, clientX }) => {
      [isHeld, touched] = [true, pointerType === "touch" ? clientX : null];
      byKey(false);
    };
    slider.onpointermove = ({ clientX }) => {
      if (touched === null || Math.abs(clientX - touched) < 8) return;
      touched = null;
      slider.oninput();
    };
    slider.onpointerup = () => setTimeout(() => isHeld && slider.onchange()); // not moved
    slider.onpointercancel = () => {
      [isHeld, touched] = [false, null];
      this.render(); // the thumb returns
    };
    slider.oninput = () => {
      if (touched !== null) return;
      // The browser has moved the thumb. If another value is written to the slider before the drag
      // ends, WebKit does not fire `change` at its end, so moveTo comes before stop, which renders.
      this.moveTo(slider.value / 1000);
      this.takeOver();
    };
    slider.onchange = () => {
      if (!isHeld) return announce(this.say());
      [isHeld, touched] = [false, null];
      slider.oninput();
      if (this.place) this.letGo?.();
    };
    slider.onkeydown = (event) => {
      isHeld = false;
      byKey(true);
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.letGo?.();
    };
  }

  go(move) {
    this.move = move;
    this.render();
  }

  moveTo(place) {
    this.place = place;
    this.render();
  }

  /** Stay here for some milliseconds, in which so much of the stage is seen, and then go on. */
  hold(left, next, share = 0) {
    this.go((passed) => {
      if (this.seen >= share) left -= passed;
      if (left < 0) next();
    });
  }

  stop() {
    this.go(null);
  }

  /** Something has changed: say it, and draw it in the next frame. */
  render() {
    if (!this.isTouched()) this.slider.value = 1000 * this.place; // or the finger is not obeyed
    this.slider.ariaValueText = `level ${Math.round(1000 * this.place ** 2)}`;
    this.say();
    this.#isOld = true;
    this.#ask();
  }

  #ask(always = this.seen) {
    if (always && !this.#asked) this.#asked = requestAnimationFrame((now) => this.#frame(now));
  }

  #frame(now) {
    this.#asked = 0;
    if (this.move) {
      const { place } = this;
      this.move(Math.min(200, now - (this.#before ?? now)));
      if (this.place !== place) this.render();
      if (this.move) this.#ask();
      else announce(this.say());
    }
    this.#before = this.move && now;
    if (this.#isOld) this.draw();
    this.#isOld = false;
  }
}

/** The gesture: drag to the noise, let go, and something new comes back. */
export class Gesture extends Timeline {
  round = 1; // the seed of the noise
  fault = ""; // what has gone wrong
  isFixed = false; // whether the same way back is shown again and again

  /** passages: what moves. its: as above, and startsAnew, whether each move begins a round. */
  constructor(name, passages, its) {
    super(name, its);
    this.passages = passages;
    const changed = (error) => (error ? this.fail(error) : this.render());
    for (const passage of passages) Object.assign(passage, { changed });
  }

  fail({ message }) {
    this.fault = message;
    this.render();
  }

  get isBack() {
    return this.passages[0].steps !== null;
  }

  /** Whether the way back is over. */
  get hasCome() {
    return !this.place && this.passages.every(({ result }) => result);
  }

  /** Move down on the way back, which begins if there is only noise, or up by adding noise. */
  moveTo(place) {
    if (place > this.place || this.startsAnew) this.#renew();
    if (place < 1 && !this.isBack && !this.passages[0].x0) this.#begin();
    super.moveTo(place);
  }

  /** What happens when the reader lets go of the slider, or presses Enter. */
  letGo() {
    if (this.place) this.sendBack();
    else this.toNoise();
  }

  /** Begin the way to the noise, which the way back follows. */
  toNoise() {
    this.#renew();
    this.go((passed) => {
      this.place = Math.min(1, this.place + (paceAt(this.place) * passed) / PACE.noising);
      if (this.place === 1) this.hold(PACE.noise, () => this.sendBack());
    });
  }

  /** Begin the way back from here, or go on. */
  sendBack() {
    if (!this.isBack) this.#begin();
    this.go((passed) => {
      const { place, passages } = this, next = place - (paceAt(place) * passed) / PACE.back;
      this.place = Math.max(0, next, ...passages.map(({ reached }) => Math.min(place, reached)));
      const isStuck = this.fault && passages[0].isWaiting;
      if (!this.place || !this.isBack || isStuck) this.move = null;
    });
  }

  /** Send it back without the reader, who may prefer to see no motion. */
  comeBack() {
    this.sendBack();
    if (still) this.place = 0;
  }

  #begin() {
    for (const passage of this.passages) passage.sendBack(this.place);
  }

  /** Add fresh noise to what has come back, or to the data. */
  #renew() {
    const [{ x0, result }] = this.passages;
    if (this.isFixed || !this.isBack || !(result || x0)) return;
    this.round++;
    for (const passage of this.passages) passage.renew(this.round);
  }
}
