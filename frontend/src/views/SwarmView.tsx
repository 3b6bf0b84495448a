/** How the swarm of each model is: which machine holds which blocks, and how it does. */

import { useEffect, useState } from "preact/hooks";

import type { ModelReport, ServerRow, SwarmState } from "../contract";
import { app } from "../page";
import { coverage, fetchSwarm, ranges } from "../state/swarm";
import { texts } from "../texts";
import { Command } from "./JoinCommand";
import { roundNumber, wholeNumber } from "./numbers";

const PERIOD_SECONDS = 10;
const ROW = 22;
const BAR = 14;

export function SwarmView() {
  const [state, setState] = useState<SwarmState | null>(null);
  const [hasFailed, setFailed] = useState(false);
  const models = app.models.all.value;
  useEffect(() => {
    if (models === null) return;
    const refresh = () => {
      if (document.hidden) return;
      fetchSwarm(models)
        .then((news) => {
          setState(news);
          setFailed(false);
        })
        .catch(() => setFailed(true));
    };
    refresh();
    const timer = setInterval(refresh, PERIOD_SECONDS * 1000);
    return () => clearInterval(timer);
  }, [models]);
  return (
    <main class="scroll-area swarm">
      <div class="column wide">
        <div class="swarm-head">
          <h2>{texts.swarm.title}</h2>
          <a class="button quiet" href="#/">
            {texts.swarm.back}
          </a>
        </div>
        <p class="muted">{texts.swarm.intro}</p>
        <p class="muted small" role="status">
          {hasFailed ? texts.swarm.failed : state === null ? texts.swarm.asking : ""}
        </p>
        {state?.model_reports.map((report) => <Report key={report.key} report={report} />)}
      </div>
    </main>
  );
}

function Report({ report }: { report: ModelReport }) {
  const { display_name: name, status, server_rows: servers, missing_blocks: missing, num_blocks: blocks } = report;
  return (
    <section class="report" aria-label={name}>
      <div class="report-head">
        <h3>{name}</h3>
        <span class={`state ${status}`}>
          <span class={`dot ${status}`} />
          {texts.swarm.states[status] ?? status}
        </span>
        <span class="muted small">{texts.swarm.summary(servers.length, blocks)}</span>
        <span class="spring" />
        {report.age_seconds !== null && <span class="muted small">{texts.swarm.updated(Math.round(report.age_seconds))}</span>}
      </div>
      {missing.length > 0 && <p class="missing">{texts.swarm.missing(texts.swarm.blocks(ranges(missing), missing.length))}</p>}
      {hasNoSpare(report) && <p class="muted small">{texts.swarm.noSpare(texts.swarm.blocks(ranges(report.rarest_blocks), report.rarest_blocks.length))}</p>}
      {blocks > 0 && <BlockMap report={report} />}
      {servers.length === 0 ? <p class="muted">{texts.swarm.noServers}</p> : <Servers servers={servers} name={name} />}
      {report.join_command && (
        <details>
          <summary>{texts.swarm.join}</summary>
          <Command intro={texts.swarm.joinBody} command={report.join_command} />
        </details>
      )}
    </section>
  );
}

/** Where there is one machine only, that is how it is, and nothing to tell. */
function hasNoSpare({ rarest_block_servers: fewest, server_rows: servers }: ModelReport): boolean {
  return fewest === 1 && servers.filter(({ state }) => state === "online").length > 1;
}

/** One row per machine; above them, how many machines hold each block. */
function BlockMap({ report }: { report: ModelReport }) {
  const { num_blocks: blocks, server_rows: servers } = report;
  const counts = coverage(report);
  const missing = counts.filter((count) => count === 0).length;
  return (
    <svg
      class="map"
      viewBox={`0 0 ${blocks} ${ROW * (servers.length + 1)}`}
      preserveAspectRatio="none"
      role="img"
      aria-label={texts.swarm.map(report.display_name, servers.length, missing)}
      height={ROW * (servers.length + 1)}
    >
      {counts.map((count, block) => (
        <rect key={block} class={`held-${Math.min(count, 3)}`} x={block} y={2} width={1} height={BAR}>
          <title>{`${texts.swarm.blocks(String(block), 1)}: ${count}`}</title>
        </rect>
      ))}
      {servers.map((server, index) => (
        <rect
          key={server.peer_id}
          class={server.state}
          x={server.span.start}
          y={ROW * (index + 1) + 2}
          width={Math.max(0, server.span.end - server.span.start)}
          height={BAR}
        >
          <title>{`${nameOf(server)}: ${spanOf(server)}, ${texts.swarm.serverStates[server.state]}`}</title>
        </rect>
      ))}
    </svg>
  );
}

function Servers({ servers, name }: { servers: ServerRow[]; name: string }) {
  const { columns } = texts.swarm;
  return (
    <div class="table" tabIndex={0} role="group" aria-label={`${columns.server}: ${name}`}>
      <table>
        <thead>
          <tr>
            {Object.values(columns).map((column) => (
              <th key={column} scope="col">
                {column}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {servers.map((server) => (
            <tr key={server.peer_id}>
              <th scope="row" title={server.peer_id}>
                {nameOf(server)}
              </th>
              <td>{spanOf(server)}</td>
              <td>
                <span class={`dot ${server.state}`} /> {texts.swarm.serverStates[server.state]}
              </td>
              <td>{shown(server.throughput, (value) => texts.swarm.perSecond(roundNumber(value)))}</td>
              <td>{shown(server.cache_tokens_left, wholeNumber)}</td>
              <td>{server.version ?? texts.swarm.unknown}</td>
              <td>{[server.torch_dtype, server.quant_type].filter((part) => part && part !== "none").join(", ") || texts.swarm.unknown}</td>
              <td>{server.using_relay == null ? texts.swarm.unknown : server.using_relay ? texts.swarm.yes : texts.swarm.no}</td>
              <td>{shown(server.ping_seconds, (value) => `${wholeNumber(value * 1000)} ms`)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function nameOf(server: ServerRow): string {
  return server.public_name || server.short_peer_id || `…${server.peer_id.slice(-8)}`;
}

/** Blocks are counted from 0, and a span ends before its end. */
function spanOf({ span }: ServerRow): string {
  return span.end - span.start === 1 ? String(span.start) : `${span.start}–${span.end - 1}`;
}

function shown(value: number | null | undefined, format: (value: number) => string): string {
  return value == null || !Number.isFinite(value) ? texts.swarm.unknown : format(value);
}
