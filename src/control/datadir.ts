// The data folder: everything that a control server or relay keeps. Only its owner may look inside.
import { accessSync, constants, mkdirSync, statSync } from "node:fs";

/** Longest path of a unix socket that Linux takes, without the closing zero. */
const MAX_SOCKET_PATH = 107;

/** Throws with one sentence when the path is too long. */
export function checkSocketPath(path: string): void {
  if (Buffer.byteLength(path) > MAX_SOCKET_PATH)
    throw new Error(
      `${path} is too long for a unix socket (${MAX_SOCKET_PATH} bytes): choose a data folder with a shorter path with --data`,
    );
}

/** Makes the folder (mode 0700) if it is absent. Throws with one sentence when it cannot be used. */
export function prepareDataDir(path: string): void {
  try {
    mkdirSync(path, { recursive: true, mode: 0o700 });
    if (!statSync(path).isDirectory()) throw new Error("it is not a folder");
    accessSync(path, constants.R_OK | constants.W_OK | constants.X_OK);
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    const reason =
      code === "EEXIST" || code === "ENOTDIR"
        ? "there is a file in its place"
        : code === "EACCES" || code === "EPERM" || code === "EROFS" || code === "ENOENT"
          ? "it is not writable for this user"
          : message;
    throw new Error(`the data folder ${path} cannot be used: ${reason}; choose another with --data`);
  }
}
