// `weft completion SHELL`: made from the same tables that the commands are found by, so it knows what there is.
import { IGNORED_CONFIG, parseFlags, UsageError } from "./flags.ts";

const USAGE = `Usage: bun run weft completion bash|zsh|fish

Prints what makes a shell complete the words of \`weft\`:

  source <(weft completion bash)      # or in ~/.bashrc, ~/.zshrc
  weft completion fish | source       # or > ~/.config/fish/completions/weft.fish`;

const FLAGS = { ...IGNORED_CONFIG, help: { kind: "boolean", short: "h" } } as const;
const SHELLS: Record<string, (commands: readonly Completable[]) => string> = { bash, zsh, fish };

/** A word of the command line, and what else it may be called: short forms are not offered, but what follows them is. */
export interface Word {
  name: string;
  aliases: readonly string[];
}

/** A command, the words of which one may follow it, and the flags of each of these; those of the command itself by "". */
export interface Completable extends Word {
  words: readonly Word[];
  flags(word: string): string[];
}

const namesOf = ({ name, aliases }: Word): string[] => [name, ...aliases];
const shown = (words: readonly Word[]): string[] => words.map(({ name }) => name);

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
    .map((command) => ({ names: namesOf(command), next: [...shown(command.words), ...command.flags("")] }))
    .filter(({ next }) => next.length > 0)
    .map(({ names, next }) => `    ${names.join("|")}) words="${next.join(" ")}" ;;`);
  const third = commands.flatMap((command) => {
    const { words, flags } = command;
    const patterns = (ends: readonly string[]) =>
      namesOf(command)
        .flatMap((name) => ends.map((end) => `"${name} "${end}`))
        .join("|");
    if (words.length === 0) return [`    ${patterns(["*"])}) words="${flags("").join(" ")}" ;;`];
    return words
      .filter(({ name }) => flags(name).length > 0)
      .map((word) => `    ${patterns(namesOf(word))}) words="${flags(word.name).join(" ")}" ;;`);
  });
  return `_weft() {
  local current="\${COMP_WORDS[COMP_CWORD]}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="${shown(commands).join(" ")}"
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
  const seen = (...words: Word[]) => `__fish_seen_subcommand_from ${words.flatMap(namesOf).join(" ")}`;
  for (const command of commands) {
    const { name, words, flags } = command;
    lines.push(`complete -c weft -n __fish_use_subcommand -a ${name}`);
    for (const flag of flags("")) lines.push(`complete -c weft -n "${seen(command)}" ${option(flag)}`);
    for (const word of words) {
      lines.push(`complete -c weft -n "${seen(command)}; and not ${seen(...words)}" -a ${word.name}`);
      for (const flag of flags(word.name))
        lines.push(`complete -c weft -n "${seen(command)}; and ${seen(word)}" ${option(flag)}`);
    }
  }
  return lines.join("\n");
}
