/** Whether the view follows a growing answer: yes, unless the reader scrolls up. Pure. */

/** Pixels of a scrolled area. */
export interface Extent {
  scrollTop: number;
  scrollHeight: number;
  clientHeight: number;
}

const NEAR_THE_END = 80;
/** Rounding of fractional pixels. */
const AT_THE_END = 2;

export class Following {
  isFollowing = true;
  #scrolledTo = 0;
  #height = 0;

  /** The area was scrolled, by whomever. */
  scrolled(extent: Extent): void {
    const below = pixelsBelow(extent);
    // What shrinks moves the reader up too, but that is not the reader's will.
    const movedUp = extent.scrollTop < this.#scrolledTo && extent.scrollHeight >= this.#height;
    // The slightest movement upwards counts, or each new token would undo it.
    if (movedUp) this.isFollowing = below < AT_THE_END;
    else if (below < NEAR_THE_END) this.isFollowing = true;
    this.#scrolledTo = extent.scrollTop;
    this.#height = extent.scrollHeight;
  }

  /** Go to the end, and stay there. */
  follow(): void {
    this.isFollowing = true;
  }

  /** Whether there is something worth going to below what is seen. */
  static hasMoreBelow(extent: Extent): boolean {
    return pixelsBelow(extent) >= NEAR_THE_END;
  }
}

function pixelsBelow({ scrollTop, scrollHeight, clientHeight }: Extent): number {
  return scrollHeight - clientHeight - scrollTop;
}
