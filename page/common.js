// What the sections share: elements, pointers and captions.

export const $ = (id) => document.getElementById(id);
export const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
export const LOADING = "The network is loading.";

/** Call call(share) whenever the share of an element that is in sight has changed, from 0 to 1, which
 * is as much as the window can show. What the captions of a narrow screen cover is not in sight. */
export function follow(element, call, rootMargin = innerWidth < 960 ? "0px 0px -28%" : "0px") {
  const threshold = Array.from({ length: 51 }, (_, k) => k / 50);
  const watch = (entries) => {
    const { intersectionRect: { height }, boundingClientRect: all, rootBounds } = entries.at(-1);
    call(height / Math.max(1, Math.min(all.height, rootBounds?.height ?? Infinity)));
  };
  new IntersectionObserver(watch, { threshold, rootMargin }).observe(element);
}

/** Let a pointer act on an element, but no second finger. A finger that goes down may mean to scroll
 * the page, so it presses when it is lifted, or moves more to the side than up or down. */
export function onPointer(element, { press, drag, release }) {
  let down = null; // the event with which a finger went down
  const begin = () => {
    if (down) press(down);
    down = null;
  };
  element.onpointerdown = (event) => {
    if (!event.isPrimary) return;
    element.setPointerCapture(event.pointerId);
    down = event;
    if (event.pointerType !== "touch") begin();
  };
  const mayScroll = ({ clientX, clientY }) => getComputedStyle(element).touchAction !== "none"
    && Math.abs(clientY - down.clientY) >= Math.abs(clientX - down.clientX);
  element.onpointermove = (event) => {
    if (!event.isPrimary || !element.hasPointerCapture(event.pointerId)) return;
    if (down && mayScroll(event)) return;
    begin();
    drag(event);
  };
  element.onpointerup = (event) => {
    if (!event.isPrimary) return;
    begin();
    release(event);
  };
  element.onpointercancel = (event) => { // the finger scrolls the page
    if (!down) release(event);
    down = null;
  };
}

/** Returns show(key, values), which shows a caption of a section and returns its text, with values
 * in the elements that name them. All captions lie in the same place: none moves the others. */
export function captions(name) {
  const boxes = [...$(`${name}-words`).children];
  return (key, values) => {
    for (const box of boxes) box.classList.toggle("shown", box.dataset.key === key);
    const shown = boxes.find((box) => box.dataset.key === key);
    for (const slot of shown.querySelectorAll("[data-value]")) {
      slot.textContent = values[slot.dataset.value];
    }
    return [...shown.children].map((part) => part.textContent).join(". ");
  };
}

/** Let the buttons in an element choose one value. */
export function onChoice(id, chosen) {
  for (const button of $(id).children) {
    button.onclick = () => {
      for (const other of $(id).children) other.ariaPressed = String(other === button);
      chosen(button.value);
    };
  }
}

let waiting; // the timer of what is to be said

/** Say something to screen readers; of several texts within a second, only the last one. */
export function announce(text) {
  clearTimeout(waiting);
  waiting = setTimeout(() => { $("live").textContent = text; }, 1000);
}
