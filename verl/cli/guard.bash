# Sourced by each bash in which `verl check` runs a script (BASH_ENV). The shell's own commands run. Programs do not run:
# they are reported to the file descriptor VERL_CHECK_FD and count as successful. This guards against accidents; it is no
# sandbox for malicious scripts.
#
# 1. PATH contains only a few programs that read (VERL_CHECK_TOOLS). It is restored before every command.
# 2. Commands that are not found are reported, and so are commands with a slash in their name. Shell scripts run under
#    the same guard.
# 3. Redirections into files are removed from a command before it runs.
# 4. If a command evades these rules, no file can grow (ulimit) and no file is emptied (noclobber).
ulimit -f 0 -c 0
set -o noclobber -o functrace

__verl_report() {
    local - name variables=()
    set +x
    for name in $VERL_CHECK_VARIABLES; do [[ -z ${!name+set} ]] || variables+=("$name=${!name}"); done
    __verl_send "$PWD" "${#variables[@]}" ${variables[@]+"${variables[@]}"} "$@"
    # Read stdin to its end: a program that writes to this one would be killed by the broken pipe.
    if [ -p /dev/stdin ]; then
        while IFS= read -r name || [ -n "$name" ]; do
            # `python3 - <<EOF`: the only output that scripts need of such a program is the name of the device.
            if [[ $name == *get_device_name\(\)* && " $* " == *python*" - "* ]]; then __verl_device; fi
        done
    fi
    # Scripts test for an NPU with `python3 -c 'import torch_npu'`.
    [[ " $* " != *" -c "*torch_npu* || -n $VERL_CHECK_NPU ]]
}

# Write the words of a report in parts. Several processes write at the same time, and a pipe keeps only writes of at most
# 4096 bytes together. A part is the process, a mark, and text: w ends a word, + does not, and a report ends with mark e.
__verl_send() {
    local LC_ALL=C word
    for word in "$@"; do
        while ((${#word} > 2000)); do
            printf '%s\0' "$BASHPID+${word:0:2000}" >&"$VERL_CHECK_FD"
            word=${word:2000}
        done
        printf '%s\0' "${BASHPID}w$word" >&"$VERL_CHECK_FD"
    done
    printf '%s\0' "${BASHPID}e" >&"$VERL_CHECK_FD"
}

__verl_device() { if [[ -n $VERL_CHECK_NPU ]]; then printf 'npu\n'; else printf 'cuda\n'; fi; }

__verl_program() {
    local first=
    if [ -f "$1" ]; then IFS= read -r first < "$1" || :; fi 2> /dev/null
    case "$first" in
    '#!'*/bash* | '#!'*/sh* | '#!'*' bash'*) __verl_script "$@" ;;
    *) __verl_report "$@" ;;
    esac
}

__verl_script() { BASH_ENV=$VERL_CHECK_GUARD "$VERL_CHECK_BASH" "$@"; }

command_not_found_handle() { __verl_report "$@"; }
bash() { if [ -f "${1-}" ]; then __verl_script "$@"; else __verl_report bash "$@"; fi; }
sh() { bash "$@"; }
kill() { :; }
# The limits of this machine are not those of the machine that trains.
ulimit() { :; }
which() { printf '%s\n' "$1"; }
hostname() { printf '%s\n' "${HOSTNAME:-localhost}"; }
date() {
    local word format='%c'
    for word in "$@"; do case "$word" in +*) format=${word#+} ;; esac; done
    printf "%($format)T\n" -1
}
command() { case "$1" in -v | -V) printf '%s\n' "$2" ;; *) "$@" ;; esac; }
exec() {
    [ $# -gt 0 ] || return 0
    "$@"
    exit
}
# Sourced files that do not exist, such as CANN's set_env.sh, are reported.
source() { if [ -f "$1" ]; then builtin source "$@"; else __verl_report source "$@"; fi; }
.() { source "$@"; }

# Set __verl_stripped to the text of a command without redirections into files. Quoted parts and $(...) do not change.
__verl_strip() {
    local text=$1 out= char quote= depth=0 i
    for ((i = 0; i < ${#text}; i++)); do
        char=${text:i:1}
        if [[ $char == \\ && $quote != \' ]]; then
            out+=${text:i:2}
            ((i++))
            continue
        fi
        if [[ -n $quote ]]; then
            [[ $char == "$quote" ]] && quote=
        elif [[ $char == [\'\"] ]]; then
            quote=$char
        elif [[ $char == '(' ]]; then
            ((depth++))
        elif [[ $char == ')' ]]; then
            ((depth--))
        elif [[ $char == '>' && $depth == 0 && ! ${text:i} =~ ^\>(\&[0-9]|\&-|[[:space:]]*/dev/(null|stderr|stdout|tty)) ]]; then
            # Remove the stream's number or & before it, and the file name behind it.
            while [[ $out == *[0-9\&\<] && $out =~ (^|[[:space:]])[0-9\&\<]+$ ]]; do out=${out%?}; done
            [[ ${text:i} =~ ^\>+[|\&]?[[:space:]]*(\>\(.*\)|\"[^\"]*\"|\'[^\']*\'|[^[:space:]\;\|\)]*)+ ]]
            ((i += ${#BASH_REMATCH[0]} - 1))
            continue
        fi
        out+=$char
    done
    __verl_stripped=$out
}

# Runs before each command; status 0: skip the command. $1: its text; other arguments: those of the current function.
__verl_skips() {
    local - text=$1 word words=() stripped=
    set +x
    shift
    shopt -s extdebug # makes the status count; if it were set earlier, bash would look for a debugger
    case "$text" in *__verl_* | *VERL_CHECK_* | *command_not_found_handle*) return 1 ;; esac
    PATH=$VERL_CHECK_TOOLS
    case "$text" in
    trap*DEBUG* | builtin\ * | enable\ * | set\ +* | shopt\ -u* | *'/dev/tcp/'* | *'/dev/udp/'*)
        [[ $text != "set +"[exuv]* && $text != 'builtin source "$@"' ]]
        return
        ;;
    '[['* | '(('* | 'for '* | 'case '* | 'select '*) return 1 ;;
    *'>'*)
        __verl_strip "$text"
        if [[ $__verl_stripped != "$text" ]]; then
            # The guard does not cover commands in $(...) of this text.
            if [[ $text == *'$('*/*')'* || $text == *'`'* ]]; then __verl_report "$text"; return 0; fi
            stripped=$__verl_stripped text=$__verl_stripped
        fi
        ;;
    esac
    # `NAME=value program`: NAME could be PATH.
    while [[ $text =~ ^[A-Za-z_][A-Za-z_0-9]*=([^\"\'[:space:]\$]|\$[A-Za-z_{}0-9]+|\"[^\"]*\"|\'[^\']*\')*[[:space:]]+ ]]; do
        [[ $text == PATH=* ]] && return 0
        text=${text:${#BASH_REMATCH[0]}}
    done
    word=${text%%[[:space:]]*}
    case "$word" in
    *'$('* | *'`'* | *=*) ;;
    '"$@"') words=("$@") ;;
    */* | *'$'*) eval "words=($word)" 2> /dev/null ;;
    esac
    # Bash first looks for a function of this name, with or without slashes.
    case "${words[0]-}" in */*) eval "function ${words[0]} { __verl_program '${words[0]}' \"\$@\"; }" ;; esac
    [[ -z $stripped ]] && return 1
    eval "$stripped" || :
    return 0
}
# Bash skips a command if the trap fails. Because of the !, `set -e` does not count this as an error.
trap '! __verl_skips "$BASH_COMMAND" "$@"' DEBUG
