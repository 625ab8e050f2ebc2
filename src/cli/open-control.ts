// The control server of a configuration, as box and control run it.
import { prepareDataDir } from "../control/datadir.ts";
import { type Control, createControl } from "../control/index.ts";
import type { Logger } from "../net/logger.ts";
import type { DERPMap } from "../wire/tailcfg.ts";
import type { ServerConfig } from "./config.ts";
import { makeFolderOf } from "./serve.ts";

export interface ControlPart {
  /** The region of the relay in this process, or that a flag names. */
  embedded: DERPMap | null;
  onNodeRemoved?: (nodeKey: Uint8Array) => void;
  log: Logger;
  cleanups: (() => unknown)[];
}

export async function openControl(config: ServerConfig, part: ControlPart): Promise<Control> {
  const { settings, dataDir, noiseKeyPath, adminSocket } = config;
  const { embedded, onNodeRemoved, log, cleanups } = part;
  prepareDataDir(dataDir);
  makeFolderOf(noiseKeyPath);
  const control = await createControl({
    dataDir,
    noiseKeyPath,
    adminSocket,
    settings: { ...settings, derp: { ...settings.derp, embedded } },
    backup: { keys: { [DERP_KEY]: config.relay.keyPath }, elsewhere: config.files },
    ...(onNodeRemoved && { onNodeRemoved }),
    log: (line) => log.warn(line),
    requestLog: log,
  });
  cleanups.push(() => control.close());
  return control;
}

/** Of the relay, in backups. */
export const DERP_KEY = "derp_private.key";
