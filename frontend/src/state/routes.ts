/** Where one is on the page, as it stands after the # of its address. Pure. */

export type Route =
  | { view: "chat"; id: string | null }
  | { view: "shared"; token: string }
  | { view: "swarm" };

export function routeOf(hash: string): Route {
  const [name, argument] = hash.replace(/^#\/?/, "").split("/", 2);
  if (name === "chat" && argument) return { view: "chat", id: decode(argument) };
  if (name === "shared" && argument) return { view: "shared", token: decode(argument) };
  return name === "swarm" ? { view: "swarm" } : { view: "chat", id: null };
}

export function hashOf(route: Route): string {
  if (route.view === "shared") return `#/shared/${encodeURIComponent(route.token)}`;
  if (route.view === "swarm") return "#/swarm";
  return route.id === null ? "#/" : `#/chat/${encodeURIComponent(route.id)}`;
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
