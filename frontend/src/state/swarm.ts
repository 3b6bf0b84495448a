/**
 * How the swarm of each model is. Where the server has no state of the swarm to tell, what it says of its models
 * and of the machines behind them.
 */

import type { Model, ModelReport, ServerRow, SwarmState } from "../contract";
import { request, RequestError } from "../http";

interface Status {
  model_name: string;
  total_blocks: number;
  peers: (Partial<ServerRow> & { peer_id: string; start: number; end: number })[];
}

export async function fetchSwarm(models: readonly Model[]): Promise<SwarmState> {
  try {
    return await request<SwarmState>("GET", "api/v1/state");
  } catch (error) {
    if (!(error instanceof RequestError) || error.code !== "not_found") throw error;
  }
  const reports = models.map(async (model) => reportOf(model, await fetchStatus(model.key)));
  return { model_reports: await Promise.all(reports) };
}

function fetchStatus(key: string): Promise<Status> {
  return request("GET", `api/status?model=${encodeURIComponent(key)}`);
}

/** What can be said of a model without the state of its swarm. */
export function reportOf(model: Model, status: Status): ModelReport {
  return {
    name: model.key,
    key: model.key,
    display_name: model.name,
    state: model.state === "ready" ? "healthy" : "broken",
    status: model.state,
    num_blocks: status.total_blocks,
    missing_blocks: model.missing_blocks,
    rarest_block_servers: 0,
    rarest_blocks: [],
    join_command: null,
    age_seconds: null,
    server_rows: status.peers.map(({ start, end, ...peer }) => ({ state: "online", ...peer, span: { start, end } })),
  };
}

/** Machines per block that answer. */
export function coverage(report: ModelReport): number[] {
  const counts = new Array<number>(report.num_blocks).fill(0);
  for (const { state, span } of report.server_rows) {
    if (state !== "online") continue;
    for (let block = Math.max(0, span.start); block < Math.min(span.end, counts.length); block++) counts[block]!++;
  }
  return counts;
}

/** Numbers as people write them: "1–3, 7". */
export function ranges(numbers: readonly number[]): string {
  const parts: string[] = [];
  let start = 0;
  numbers.forEach((number, index) => {
    if (numbers[index + 1] === number + 1) return;
    parts.push(start === index ? String(number) : `${numbers[start]}–${number}`);
    start = index + 1;
  });
  return parts.join(", ");
}
