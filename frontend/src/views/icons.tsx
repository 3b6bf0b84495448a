/** The pictures on buttons, of lines 24 units wide. */

const PATHS = {
  plus: "M12 5v14M5 12h14",
  panel: "M4 5h16v14H4zM9.5 5v14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v10H9zM5 15V5h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M4 20l.8-4L16 4.8l3.2 3.2L8 19.2zM14 7l3 3",
  redo: "M19 12a7 7 0 1 1-2-4.9M19 4v4h-4",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  search: "M11 5a6 6 0 1 0 0 12 6 6 0 0 0 0-12M15.5 15.5L20 20",
  sliders: "M4 8h9M17 8h3M15 5.5v5M4 16h3M11 16h9M9 13.5v5",
  chevron: "M7 10l5 5 5-5",
  left: "M14 7l-5 5 5 5",
  right: "M10 7l5 5-5 5",
  down: "M12 5v14M6 13l6 6 6-6",
  close: "M6 6l12 12M18 6L6 18",
  pin: "M9 4h6l-.8 6L17 13H7l2.8-3zM12 13v7",
  share: "M12 15V4M8 8l4-4 4 4M5 13v6h14v-6",
  import: "M12 4v11M8 11l4 4 4-4M5 15v4h14v-4",
  help: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16M9.8 9.6a2.3 2.3 0 1 1 3.3 2.1c-.8.4-1.1.9-1.1 1.7M12 16.3v.01",
  swarm: "M12 7.2a2.2 2.2 0 1 0 0-4.4 2.2 2.2 0 0 0 0 4.4M5.5 20a2.2 2.2 0 1 0 0-4.4 2.2 2.2 0 0 0 0 4.4M18.5 20a2.2 2.2 0 1 0 0-4.4 2.2 2.2 0 0 0 0 4.4M11 7l-4.4 8.7M13 7l4.4 8.7M7.7 17.8h8.6",
  play: "M8 5.5v13l10-6.5z",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l.8 12.5h8.4L17 7M10.3 10.5l.3 5.5M13.7 10.5l-.3 5.5",
} as const;

export function Icon({ name }: { name: keyof typeof PATHS }) {
  return (
    <svg class={`icon icon-${name}`} viewBox="0 0 24 24" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}
