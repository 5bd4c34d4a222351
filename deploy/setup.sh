# shellcheck shell=sh
# Sourced by deploy/demo and deploy/test: everything that must be there before caxev can run.
#
#   set_up EXTRA PAIR...    makes $venv with caxev[EXTRA] in it, then sees to Debian packages;
#                           each PAIR is COMMAND:PACKAGE[,PACKAGE...]; if one is missing,
#                           tests are skipped
#
# Needs $root, the checkout. All messages go to stderr. If something is missing that it cannot install,
# it prints what to install, in one line, and ends with status 3.
# Packages come from the index that pip or uv is configured for.

say() { printf 'caxev: %s\n' "$*" >&2; }
die() { say "$*"; exit 3; }
has() { PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; }

set_up() {
    extra=$1
    shift
    choose_venv
    if ! is_stamped; then
        install_caxev
        find_libraries
        fingerprint >"$(stamp)"
    fi
    for pair; do
        packages=$(printf '%s' "${pair#*:}" | tr ',' ' ')
        # shellcheck disable=SC2086  # several words
        has "${pair%%:*}" || apt_install $packages ||
            say "no ${pair%%:*}, so some tests are skipped: as root, apt-get install $packages"
    done
}

# --- where: .venv in the checkout, or in the cache of a user who may not write there ------------

choose_venv() {
    src=${root:?}
    venv=$root/.venv
    if is_stamped; then return; fi
    if [ -w "$root" ] && { [ ! -e "$venv" ] || [ -w "$venv" ]; }; then return; fi
    home=${XDG_CACHE_HOME:-${HOME:?}/.cache}/caxev-$(printf '%s' "$root" | cksum | cut -d ' ' -f 1)
    src=$home/src
    venv=$home/.venv
    link_source
}

# An editable install writes beside pyproject.toml, so there it is given a directory of links.
link_source() {
    mkdir -p "$src" || die "cannot write to $root nor to $src: set XDG_CACHE_HOME"
    for file in "$root"/*; do
        case $file in *.egg-info | */build | */dist) ;; *) ln -sfn "$file" "$src/" ;; esac
    done
}

# --- when: a stamp in the venv shows that nothing has changed since -----------------------------

stamp() { echo "$venv/caxev-$extra.stamp"; }
fingerprint() {
    { cat "$root/pyproject.toml" "$venv/pyvenv.cfg" && echo "$src $venv $extra"; } | cksum
}
is_stamped() {
    [ -r "$(stamp)" ] && [ "$(cat "$(stamp)")" = "$(fingerprint)" ] && suits "$venv/bin/python"
}

# --- Python and caxev ---------------------------------------------------------------------------

suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() {
    for python in python3 python3.13 python3.12 python3.11; do
        if has "$python" && suits "$python"; then return; fi
    done
    return 1
}

install_caxev() {
    say "setting up $venv, once: this may take a minute"
    if ! venv_is_usable; then
        find_python || { apt_install python3 python3-venv && find_python; } ||
            die "no Python 3.11 to 3.13: install one (Debian: apt-get install python3 python3-venv)"
        if ! with_uv; then with_pip; fi
    elif ! has uv || ! uv_install; then
        pip_install
    fi
}

# A venv that has been moved does not work: its scripts name the old place.
venv_is_usable() {
    [ -r "$venv/bin/activate" ] && grep -qF "$venv" "$venv/bin/activate" && suits "$venv/bin/python"
}

with_uv() { has uv && uv venv --quiet --clear --python "$python" "$venv" >&2 && uv_install; }
uv_install() { uv pip install --quiet --python "$venv/bin/python" --editable "${src}[$extra]" >&2; }

with_pip() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install "${python##*/}-venv" ||
        die "$python cannot make virtual environments: as root, apt-get install ${python##*/}-venv"
    "$python" -m venv --clear "$venv" >&2
    pip_install
}
pip_install() {
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >&2
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
        --editable "${src}[$extra]" >&2
}

# --- Debian packages ----------------------------------------------------------------------------

# The libraries that the embedded extra's mongod needs beyond a minimal Debian 12, unless the machine
# has a mongod of its own.
find_libraries() {
    if has "${CAXEV_MONGOD:-mongod}" || ! is_library_missing; then return; fi
    { apt_install libcurl4 libssl3 liblzma5 && ! is_library_missing; } ||
        die "mongod lacks $missing: as root, apt-get install libcurl4 libssl3 liblzma5"
}
is_library_missing() {
    missing=$(ldd "$venv"/lib/python3.*/site-packages/fiftyone/db/bin/mongod 2>/dev/null |
        sed -n 's/^[[:space:]]*\(.*\) => not found.*/\1/p' | tr '\n' ' ')
    [ -n "$missing" ]
}

# apt_install PACKAGE...: fails unless it runs as root on Debian. Servers that are installed are not
# started, now or at the next boot: the tests start their own.
apt_install() {
    [ "$(id -u)" = 0 ] && has apt-get || return 1
    say "apt-get install $*"
    policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then policy=; else
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        trap 'rm -f "$policy"' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
    fi
    installed=0
    apt_get "$@" 2>/dev/null || { apt-get -qq update >&2 && apt_get "$@"; } || installed=$?
    if [ -n "$policy" ]; then
        rm -f "$policy"
        trap - EXIT INT TERM
    fi
    case " $* " in
    *" openssh-server "*) not_at_boot ssh.service ;;
    *" slurm-wlm "*) not_at_boot munge.service slurmctld.service slurmd.service ;;
    *" prometheus "*) not_at_boot prometheus.service ;;
    esac
    return "$installed"
}
not_at_boot() {
    if [ -d /run/systemd/system ]; then systemctl --quiet disable "$@" >&2 || :; fi
}
apt_get() {
    DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends "$@" >/dev/null
}
