# Read by each bash that `verl check` runs a script in (BASH_ENV). The shell's own commands run; programs do not: they are
# reported, to the file descriptor VERL_CHECK_FD, and count as done. A guard against accidents, no prison for malice.
#
# 1. PATH leads to a few programs that only look (VERL_CHECK_TOOLS); it is put back before every command.
# 2. What is not there is reported. So is what has a slash in its name, but for shell scripts, which run in the same way.
# 3. Redirections into files are taken off a command before it runs.
# 4. Should something get past that: no file can grow (ulimit) and none is emptied (noclobber).
ulimit -f 0 -c 0
set -o noclobber -o functrace

__verl_report() {
    local - name variables=()
    set +x
    for name in $VERL_CHECK_VARIABLES; do [[ -z ${!name+set} ]] || variables+=("$name=${!name}"); done
    printf '%s\0' "$PWD" "${#variables[@]}" ${variables[@]+"${variables[@]}"} "$#" "$@" >&"$VERL_CHECK_FD"
    # Whoever writes to a program that does not run would die of the broken pipe.
    if [ -p /dev/stdin ]; then while IFS= read -r _; do :; done; fi
    # How scripts ask for an NPU: `python3 -c 'import torch_npu'`.
    [[ " $* " != *" -c "*torch_npu* || -n $VERL_CHECK_NPU ]]
}

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
# Sourced files that are not here, such as CANN's set_env.sh, are reported.
source() { if [ -f "$1" ]; then builtin source "$@"; else __verl_report source "$@"; fi; }
.() { source "$@"; }

# The text of a command without its redirections into files, in __verl_stripped; quoted parts and $(...) stay as they are.
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
            # A stream's number or & before it, what follows up to the next blank behind it.
            while [[ $out == *[0-9\&\<] && $out =~ (^|[[:space:]])[0-9\&\<]+$ ]]; do out=${out%?}; done
            [[ ${text:i} =~ ^\>+[|\&]?[[:space:]]*(\>\(.*\)|\"[^\"]*\"|\'[^\']*\'|[^[:space:]\;\|\)]*)+ ]]
            ((i += ${#BASH_REMATCH[0]} - 1))
            continue
        fi
        out+=$char
    done
    __verl_stripped=$out
}

# Before each command: whether to leave it out. $1: its text; the rest: the arguments of the function that it is in.
__verl_skips() {
    local - text=$1 word words=() whole=
    set +x
    shift
    shopt -s extdebug # the status counts; set any earlier, bash would look for a debugger
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
            # Nothing guards what $(...) runs from here.
            if [[ $text == *'$('*/*')'* || $text == *'`'* ]]; then __verl_report "$text"; return 0; fi
            whole=$__verl_stripped text=$__verl_stripped
        fi
        ;;
    esac
    # `NAME=value program`: PATH could be such a name.
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
    # Bash looks for a function of that name first, slashes or not.
    case "${words[0]-}" in */*) eval "function ${words[0]} { __verl_program '${words[0]}' \"\$@\"; }" ;; esac
    [[ -z $whole ]] && return 1
    eval "$whole" || :
    return 0
}
# Bash leaves a command out where the trap fails; turned round by !, that is no error to `set -e`.
trap '! __verl_skips "$BASH_COMMAND" "$@"' DEBUG
