// `weft completion SHELL`: made from the same tables that the commands are found by, so it knows what there is.
import { IGNORED_CONFIG, parseFlags, UsageError } from "./flags.ts";

const USAGE = `Usage: bun run weft completion bash|zsh|fish

Prints what makes a shell complete the words of \`weft\`:

  source <(weft completion bash)      # or in ~/.bashrc, ~/.zshrc
  weft completion fish | source       # or > ~/.config/fish/completions/weft.fish`;

const FLAGS = { ...IGNORED_CONFIG, help: { kind: "boolean", short: "h" } } as const;
const SHELLS: Record<string, (commands: readonly Completable[]) => string> = { bash, zsh, fish };

/** A command, the words of which one may follow it, and the flags of each of these; those of the command itself by "". */
export interface Completable {
  name: string;
  words: readonly string[];
  flags(word: string): string[];
}

export async function main(argv: string[], commands: readonly Completable[]): Promise<number> {
  const flags = parseFlags("weft completion", argv, FLAGS, USAGE, 1);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const shell = SHELLS[flags._[0] ?? ""];
  if (!shell) throw new UsageError(`for which shell? It is one of ${Object.keys(SHELLS).join(", ")}`);
  console.log(shell(commands));
  return 0;
}

/** Words after `weft`, after `weft NOUN`, and after `weft NOUN VERB`; flags after a command without words. */
function bash(commands: readonly Completable[]): string {
  const second = commands
    .map(({ name, words, flags }) => ({ name, next: [...words, ...flags("")] }))
    .filter(({ next }) => next.length > 0)
    .map(({ name, next }) => `    ${name}) words="${next.join(" ")}" ;;`);
  const third = commands.flatMap(({ name, words, flags }) => {
    if (words.length === 0) return [`    "${name} "*) words="${flags("").join(" ")}" ;;`];
    return words
      .filter((word) => flags(word).length > 0)
      .map((word) => `    "${name} ${word}") words="${flags(word).join(" ")}" ;;`);
  });
  return `_weft() {
  local current="\${COMP_WORDS[COMP_CWORD]}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="${commands.map(({ name }) => name).join(" ")}"
  elif [ "$COMP_CWORD" -eq 2 ]; then
    case "\${COMP_WORDS[1]}" in
${second.join("\n")}
    esac
  else
    case "\${COMP_WORDS[1]} \${COMP_WORDS[2]}" in
${third.join("\n")}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -F _weft weft`;
}

/** zsh runs bash's. */
function zsh(commands: readonly Completable[]): string {
  return `autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n${bash(commands)}`;
}

function fish(commands: readonly Completable[]): string {
  const lines = ["complete -c weft -f"];
  const option = (flag: string) => (flag.startsWith("--") ? `-l ${flag.slice(2)}` : `-s ${flag.slice(1)}`);
  for (const { name, words, flags } of commands) {
    lines.push(`complete -c weft -n __fish_use_subcommand -a ${name}`);
    for (const flag of flags(""))
      lines.push(`complete -c weft -n "__fish_seen_subcommand_from ${name}" ${option(flag)}`);
    for (const word of words) {
      lines.push(
        `complete -c weft -n "__fish_seen_subcommand_from ${name}; and not __fish_seen_subcommand_from ${words.join(" ")}" -a ${word}`,
      );
      for (const flag of flags(word))
        lines.push(
          `complete -c weft -n "__fish_seen_subcommand_from ${name}; and __fish_seen_subcommand_from ${word}" ${option(flag)}`,
        );
    }
  }
  return lines.join("\n");
}
