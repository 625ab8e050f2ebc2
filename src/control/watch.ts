// Tells when a file that an operator edits has other content: by the kernel's word where there is one, and by looking now
// and then, since editors replace files, mounts swap folders behind links, and some file systems tell nothing.
import { type FSWatcher, readFileSync, statSync, watch } from "node:fs";
import { basename, dirname } from "node:path";

/** Milliseconds between looks. */
const LOOK = 2_000;
/** Milliseconds after a word of the kernel: who writes a file writes it in several steps. */
const SETTLE = 50;

/** At most this many bytes are read. Throws with one sentence. */
export function readSmallFile(path: string, max: number): string {
  try {
    const { size } = statSync(path);
    if (size > max) throw new Error(`it has ${size} bytes, more than the ${max} that are allowed`);
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new Error(`${path} cannot be read: ${(error as Error).message}`);
  }
}

/** Another text when there is another file, or other content, behind the path; of what cannot be looked at, the reason. */
export function markOf(path: string): string {
  try {
    const { ino, size, mtimeMs, ctimeMs } = statSync(path);
    return `${ino} ${size} ${mtimeMs} ${ctimeMs}`;
  } catch (error) {
    return String((error as NodeJS.ErrnoException).code);
  }
}

export class FileWatch {
  private watcher: FSWatcher | null = null;
  private readonly timer: ReturnType<typeof setInterval>;
  private settling: ReturnType<typeof setTimeout> | null = null;
  private seen: string;

  /** `changed` is called after the file was written, replaced, removed or made anew. */
  constructor(
    private readonly path: string,
    private readonly changed: () => void,
    every = LOOK,
  ) {
    this.seen = markOf(path);
    this.timer = setInterval(() => this.look(), every);
    this.listen();
  }

  close(): void {
    clearInterval(this.timer);
    if (this.settling) clearTimeout(this.settling);
    this.watcher?.close();
    this.watcher = null;
  }

  private look(): void {
    const now = markOf(this.path);
    if (now === this.seen) return;
    this.seen = now;
    this.changed();
  }

  /** The folder is watched, since a file that is replaced is another file. */
  private listen(): void {
    try {
      this.watcher = watch(dirname(this.path), (_event, name) => {
        if (name !== null && name !== basename(this.path)) return;
        if (this.settling) clearTimeout(this.settling);
        this.settling = setTimeout(() => this.look(), SETTLE);
      });
      this.watcher.on("error", () => {
        this.watcher?.close();
        this.watcher = null;
      });
    } catch {
      // Looking now and then must do.
    }
  }
}
