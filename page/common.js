// What the sections share: elements, pointers and captions.

export const $ = (id) => document.getElementById(id);
export const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

const COVERED = innerWidth < 960 ? "0px 0px -28%" : "0px"; // a narrow screen has captions below

/** Call call(share) whenever the share of an element that is in sight, from 0 to 1, has changed. */
export function follow(element, call, rootMargin = COVERED) {
  const watch = (entries) => call(entries.at(-1).intersectionRatio);
  new IntersectionObserver(watch, { threshold: [0, 0.01, 0.4, 0.7], rootMargin }).observe(element);
}

/** Let a pointer act on an element, but no second finger. */
export function onPointer(element, { press, drag, release }) {
  element.onpointerdown = (event) => {
    if (!event.isPrimary) return;
    element.setPointerCapture(event.pointerId);
    press(event);
  };
  const holds = ({ isPrimary, pointerId }) => isPrimary && element.hasPointerCapture(pointerId);
  element.onpointermove = (event) => holds(event) && drag(event);
  element.onpointerup = (event) => event.isPrimary && release(event);
  element.onpointercancel = release; // the finger scrolls the page
}

/** Returns show(key, values), which shows a caption of a section, with values in the place of
 * {names}, and returns it. All captions lie in the same place, so that none moves the others. */
export function captions(name) {
  const boxes = [...$(`${name}-words`).children].map((box) => {
    const parts = [...box.children];
    return { box, key: box.dataset.key, parts, texts: parts.map((part) => part.textContent) };
  });
  return (key, values = {}) => {
    for (const { box, ...its } of boxes) box.classList.toggle("shown", its.key === key);
    const { parts, texts } = boxes.find((its) => its.key === key);
    return parts.map((part, k) => {
      const text = texts[k].replace(/{(\w+)}/g, (_, value) => values[value]);
      if (part.textContent !== text) part.textContent = text;
      return text;
    }).join(". ");
  };
}

/** Let the buttons in an element choose one of their values. Returns choose(value), which shows a
 * choice without acting on it. */
export function onChoice(id, chosen) {
  const buttons = [...$(id).querySelectorAll("button")];
  const choose = (value) => {
    for (const button of buttons) button.ariaPressed = String(button.value === value);
  };
  for (const button of buttons) {
    button.onclick = () => {
      choose(button.value);
      chosen(button.value);
    };
  }
  return choose;
}

let waiting; // the timer of what is to be said

/** Say something to screen readers; of several texts within a second, only the last one. */
export function announce(text) {
  clearTimeout(waiting);
  waiting = setTimeout(() => { $("live").textContent = text; }, 1000);
}
