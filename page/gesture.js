// The gesture of every section: drag to noise, let go, and something new comes back.

import { $, animate, announce, follow, still } from "./common.js";

const PACE = { rest: 3000, noising: 2200, noise: 500, back: 3900, jump: 1200 }; // milliseconds
/** How fast it moves at a place: slowly near the data, where most is to be seen. A whole way takes as long as with a pace of 1. */
const paceAt = (place) => 0.3 + 2.06 * place;

export class Gesture {
  place = 0; // from 0, the data, to 1, the noise
  moving = false;
  repeats = false; // whether it begins again by itself, until the reader takes over
  jumps = false; // whether the next way back is one jump
  hold = 0; // milliseconds for which it stays where it is
  round = 1; // the seed of the noise
  begun = false; // by the reader, or by itself
  paused = false; // by the reader, on its way

  /**
   * name: of the ids of its stage and its slider. passages: what moves. draw(): draws all of it.
   * say(): says what is seen, and returns it. stays: whether the slider stays where the reader let go.
   */
  constructor(name, passages, draw, say, stays = false) {
    Object.assign(this, { passages, draw, say, stays, slider: $(`${name}-place`), stage: $(`${name}-stage`) });
    this.ask = animate(this.stage, (passed) => {
      if (this.moving) this.#advance(passed);
      this.draw();
      return this.moving;
    });
    this.#listen();
  }

  // ---- the state

  get isBack() {
    return this.passages[0].steps !== null;
  }

  /** Whether all have come as far as they can. */
  get isComplete() {
    return this.passages.every((passage) => passage.isComplete);
  }

  get level() {
    return Math.max(0, Math.round(this.passages[0].levelAt(this.place)));
  }

  // ---- what changes it

  /** Move to a place: down on the way back, up by adding noise to what has come back so far. Where the slider
   * stays, each move adds noise. */
  moveTo(place) {
    if (this.isBack && place && (place > this.place || this.stays)) this.#renew();
    this.place = place;
    this.render();
  }

  /** Begin the way to the noise, which the way back follows. */
  toNoise(jumps = false) {
    if (this.isBack) this.#renew();
    Object.assign(this, { jumps, moving: true, paused: false, hold: 0 });
    this.render();
  }

  /** Let go: begin the way back from here, in many steps or one jump. In the middle of a jump, nothing
   * is on the way, so that it begins where the jump began. */
  sendBack(jumps = false) {
    if (this.place === 0) return this.toNoise(jumps);
    const [{ from, jumps: jumped }] = this.passages;
    if (!this.isBack || jumped !== jumps) {
      if (this.isBack && jumped) this.place = from;
      for (const passage of this.passages) passage.sendBack(this.place, jumps);
    }
    Object.assign(this, { jumps, moving: true, paused: false, hold: 0 });
    this.render();
  }

  /** Show the end of the way back at once, as soon as there is one. */
  finish() {
    Object.assign(this, { place: 0, moving: false });
    this.render();
  }

  /** Stop for the reader, who takes over. */
  stop() {
    Object.assign(this, { repeats: false, moving: false, paused: false, begun: true });
  }

  /** Stop, or go on in the same direction. */
  pause() {
    const paused = !this.paused;
    this.stop();
    Object.assign(this, { paused, moving: !paused });
    this.render();
  }

  /** Begin by itself when the stage is seen for the first time, unless the reader was faster or prefers no motion. */
  beginWhenSeen(begin = () => this.toNoise()) {
    follow(this.stage, (isSeen) => {
      if (!isSeen || this.begun || still) return;
      this.begun = true;
      begin();
    }, 0.6);
  }

  #renew() {
    this.round++;
    for (const passage of this.passages) passage.renew(this.round);
  }

  /** What happens in some milliseconds. */
  #advance(passed) {
    this.hold -= passed;
    if (this.hold > 0) return;
    const { place, jumps, passages } = this;
    if (!this.isBack && place < 1) {
      this.place = Math.min(1, place + (paceAt(place) * passed) / PACE.noising);
      if (this.place === 1) this.hold = PACE.noise;
    } else if (!this.isBack) return this.sendBack(jumps);
    else if (place > 0) {
      const next = place - (jumps ? (passages[0].from * passed) / PACE.jump : (paceAt(place) * passed) / PACE.back);
      this.place = Math.max(0, next, ...passages.map(({ reached }) => Math.min(place, reached)));
      if (this.place === 0) this.hold = this.repeats ? PACE.rest : 0;
    } else if (this.repeats) return this.toNoise(this.round % 3 === 2);
    else this.moving = false;
    this.render();
    if (!this.moving) announce(this.say());
  }

  #listen() {
    const { slider } = this;
    let held = null; // {x, moves, value}: a finger moves it only sideways, so that the page can be scrolled
    const move = (value) => {
      this.stop();
      this.moveTo(value / 1000);
    };
    slider.onpointerdown = ({ pointerId, pointerType, clientX: x }) => {
      held = { x, moves: pointerType === "mouse" };
      if (held.moves) this.stop();
      slider.setPointerCapture(pointerId);
    };
    slider.onpointermove = ({ clientX }) => {
      if (held && Math.abs(clientX - held.x) > 8) held.moves = true;
    };
    slider.onpointerup = slider.onpointercancel = ({ type }) => {
      if (held && !held.moves && type === "pointerup") move(held.value ?? slider.value); // a tap
      else if (!held?.moves) return;
      if (this.place) this.sendBack();
      held = null;
    };
    slider.oninput = () => {
      if (!held || held.moves) return move(slider.value);
      held.value = slider.value;
      this.render();
    };
    slider.onfocus = () => {
      if (this.repeats) this.stop();
    };
    slider.onchange = () => {
      if (!held) announce(this.say());
    };
    slider.onkeydown = (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.sendBack();
    };
  }

  // ---- what shows it

  /** Say what is seen, and draw it in the next frame. */
  render() {
    this.slider.value = 1000 * (this.stays && this.isBack ? this.passages[0].from : this.place);
    this.slider.style.setProperty("--from", this.isBack ? this.passages[0].from : -1); // a mark
    this.slider.ariaValueText = `level ${this.level}`;
    this.say();
    this.ask();
  }
}
