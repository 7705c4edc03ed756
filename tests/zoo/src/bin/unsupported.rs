//! Kernel state that cannot be checkpointed, of the kind in ZOO_KIND. A dump must be refused, and leave everything as it was.
#![allow(unsafe_code, reason = "objects that have no library functions")]

use zoo::{Zoo, check, ensure, ensure_eq, errno, ok};

/// A system call that makes a descriptor.
macro_rules! make {
    ($name:literal, $($arg:expr),+) => {{
        // SAFETY: integers, and pointers to what the call wants that outlives it.
        let fd = unsafe { libc::syscall($($arg),+) };
        if fd < 0 { Err(format!("{}: errno {}", $name, errno())) } else { Ok(fd as i32) }
    }};
}

fn open(path: &str) -> Result<i32, String> {
    let path = zoo::cstring(path);
    make!("open", libc::SYS_open, path.as_ptr(), libc::O_RDWR)
}

fn perf_event() -> Result<i32, String> {
    // PERF_TYPE_SOFTWARE, PERF_ATTR_SIZE_VER0, PERF_COUNT_SW_TASK_CLOCK.
    let mut attr = [0u64; 16];
    attr[0] = 1 | 64 << 32;
    attr[1] = 1;
    make!("perf_event_open", libc::SYS_perf_event_open, attr.as_ptr(), 0, -1, -1, 0)
}

/// A ruleset that knows of executing files.
fn ruleset() -> Result<i32, String> {
    let handled = [1u64];
    make!("landlock_create_ruleset", libc::SYS_landlock_create_ruleset, handled.as_ptr(), 8, 0)
}

fn landlock() -> Result<i32, String> {
    let fd = ruleset()?;
    no_new_privs()?;
    make!("landlock_restrict_self", libc::SYS_landlock_restrict_self, fd, 0)?;
    // SAFETY: our descriptor.
    unsafe { libc::close(fd) };
    Ok(-1)
}

fn no_new_privs() -> zoo::Check {
    // SAFETY: integers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, "PR_SET_NO_NEW_PRIVS")
}

/// A filter that asks a supervisor about sethostname(2).
fn listener() -> Result<i32, String> {
    const NEW_LISTENER: u64 = 8;
    let code: [(u16, u8, u8, u32); 4] = [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, libc::SYS_sethostname as u32),
        (0x06, 0, 0, 0x7fc0_0000),
        (0x06, 0, 0, 0x7fff_0000),
    ];
    let bytes: Vec<u8> = code
        .iter()
        .flat_map(|(code, jt, jf, k)| {
            [&code.to_ne_bytes()[..], &[*jt, *jf], &k.to_ne_bytes()].concat()
        })
        .collect();
    let program = (code.len() as u64, bytes.as_ptr());
    no_new_privs()?;
    make!("SECCOMP_SET_MODE_FILTER", libc::SYS_seccomp, 1, NEW_LISTENER, &raw const program)
}

/// A lease that another process is breaking: it has tried to open the file.
fn broken_lease() -> Result<i32, String> {
    let path = std::env::args().nth(1).unwrap_or_default() + "/leased";
    std::fs::write(&path, "leased").map_err(|e| e.to_string())?;
    zoo::block(libc::SIGIO)?;
    let fd = open(&path)?;
    make!("F_SETLEASE", libc::SYS_fcntl, fd, libc::F_SETLEASE, libc::F_WRLCK)?;
    let other = zoo::cstring(&path);
    let flags = libc::O_RDONLY | libc::O_NONBLOCK;
    // SAFETY: NUL-terminated.
    let opened = unsafe { libc::open(other.as_ptr(), flags) };
    ensure!(opened < 0, "the lease lets others open the file");
    Ok(fd)
}

/// A userfaultfd that gets the faults of a mapping; mode 1: missing pages, 2: write protection.
fn registered(mode: u64) -> Result<i32, String> {
    const LEN: usize = 16 << 12;
    let fd = make!("userfaultfd", libc::SYS_userfaultfd, libc::O_NONBLOCK)?;
    let p = zoo::mmap_anon(LEN, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
    let mut api = [0xaau64, 0, 0];
    make!("UFFDIO_API", libc::SYS_ioctl, fd, 0xc018_aa3fu64, api.as_mut_ptr())?;
    let mut range = [p as u64, LEN as u64, mode, 0];
    make!("UFFDIO_REGISTER", libc::SYS_ioctl, fd, 0xc020_aa00u64, range.as_mut_ptr())?;
    Ok(fd)
}

/// As missing pages, but whoever handles them is outside the tree.
fn registered_outside(z: &Zoo) -> Result<i32, String> {
    let fd = registered(1)?;
    // As standard input, which one outside keeps: it lives as long as that.
    // SAFETY: descriptors of our own.
    unsafe {
        check(libc::dup2(fd, 0) - libc::STDIN_FILENO, "dup2")?;
        libc::close(fd);
    }
    z.outside(|z| {
        z.publish("handles", "");
        while !z.is_over() {
            zoo::nap(10);
        }
        Ok(())
    })?;
    z.wait_for("handles")?;
    let null = open("/dev/null")?;
    // SAFETY: descriptors of our own.
    unsafe {
        check(libc::dup2(null, 0) - libc::STDIN_FILENO, "dup2")?;
        libc::close(null);
    }
    Ok(-1)
}

/// A virtual machine whose processor is in an endless loop, which is all the program has in memory.
fn running_guest() -> Result<i32, String> {
    const CREATE_VM: u64 = 0xae01;
    const VCPU_MMAP_SIZE: u64 = 0xae04;
    const CREATE_VCPU: u64 = 0xae41;
    const SET_MEMORY: u64 = 0x4020_ae46;
    const GET_SREGS: u64 = 0x8138_ae83;
    const SET_SREGS: u64 = 0x4138_ae84;
    const SET_REGS: u64 = 0x4090_ae82;
    const RUN: u64 = 0xae80;
    let ioctl =
        |fd: i32, request: u64, arg: usize| make!("ioctl", libc::SYS_ioctl, fd, request, arg);
    let kvm = open("/dev/kvm")?;
    let machine = ioctl(kvm, CREATE_VM, 0)?;
    let memory = zoo::mmap(
        0,
        4096,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        -1,
        0,
    )?;
    // SAFETY: a page of our own. The code is `jmp $`.
    unsafe { (memory as *mut [u8; 2]).write([0xeb, 0xfe]) };
    // Slot and flags, guest address, size, our address.
    let region = [0u64, 0, 4096, memory as u64];
    ioctl(machine, SET_MEMORY, region.as_ptr() as usize)?;
    let processor = ioctl(machine, CREATE_VCPU, 0)?;
    let size = ioctl(kvm, VCPU_MMAP_SIZE, 0)? as usize;
    zoo::mmap(0, size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, processor, 0)?;
    let mut sregs = [0u8; 0x138];
    ioctl(processor, GET_SREGS, sregs.as_mut_ptr() as usize)?;
    // Base and selector of the code segment.
    sregs[..8].fill(0);
    sregs[12..14].fill(0);
    ioctl(processor, SET_SREGS, sregs.as_ptr() as usize)?;
    let mut regs = [0u64; 18];
    // Flags; the instruction pointer before them is 0.
    regs[17] = 2;
    ioctl(processor, SET_REGS, regs.as_ptr() as usize)?;
    std::thread::spawn(move || {
        loop {
            // SAFETY: an integer. A signal ends it, nothing else.
            unsafe { libc::ioctl(processor, RUN, 0) };
        }
    });
    zoo::nap(50);
    Ok(machine)
}

fn make(z: &Zoo, kind: &str) -> Result<i32, String> {
    match kind {
        "perf_event" => perf_event(),
        "userfaultfd" => make!("userfaultfd", libc::SYS_userfaultfd, 1),
        "userfaultfd_missing" => registered(1),
        "userfaultfd_wp" => registered(2),
        "userfaultfd_outside" => registered_outside(z),
        "secretmem_mapped" => {
            let fd = make!("memfd_secret", libc::SYS_memfd_secret, 0)?;
            // SAFETY: our descriptor.
            check(unsafe { libc::ftruncate(fd, 8192) }, "ftruncate")?;
            zoo::mmap(0, 8192, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)?;
            // SAFETY: our descriptor.
            unsafe { libc::close(fd) };
            Ok(-1)
        }
        "kvm" => {
            let kvm = open("/dev/kvm")?;
            // KVM_CREATE_VM
            make!("KVM_CREATE_VM", libc::SYS_ioctl, kvm, 0xae01, 0)
        }
        "fsopen" => make!("fsopen", libc::SYS_fsopen, c"tmpfs".as_ptr(), 0),
        "secretmem" => make!("memfd_secret", libc::SYS_memfd_secret, 0),
        "ruleset" => ruleset(),
        "landlock" => landlock(),
        "landlock_user" => {
            // SAFETY: integers.
            unsafe {
                check(libc::setresgid(4712, 4712, 4712), "setresgid")?;
                check(libc::setresuid(4711, 4711, 4711), "setresuid")?;
            }
            landlock()
        }
        "listener" => listener(),
        "notify_filter" => {
            // SAFETY: our descriptor.
            unsafe { libc::close(listener()?) };
            Ok(-1)
        }
        "bpf_prog" => {
            // BPF_PROG_LOAD: a socket filter, r0 = 0; exit.
            let code: [u64; 2] = [0xb7, 0x95];
            let mut attr = [0u64; 16];
            attr[0] = 1 | 2 << 32;
            attr[1] = code.as_ptr() as u64;
            attr[2] = c"GPL".as_ptr() as u64;
            make!("BPF_PROG_LOAD", libc::SYS_bpf, 5, attr.as_ptr(), 128)
        }
        "bpf_ring" => {
            let attr = [27u32, 0, 0, 4096, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            make!("BPF_MAP_CREATE", libc::SYS_bpf, 0, attr.as_ptr(), 64)
        }
        "fuse" => open("/dev/fuse"),
        "keyring" => {
            // KEYCTL_GET_KEYRING_ID of KEY_SPEC_PROCESS_KEYRING, which makes it.
            make!("keyctl", libc::SYS_keyctl, 0, -2, 1)?;
            Ok(-1)
        }
        "mqueue" => {
            let name = zoo::cstring(format!("zoo-{}", std::process::id()));
            let how = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
            let fd = make!("mq_open", libc::SYS_mq_open, name.as_ptr(), how, 0o600, 0)?;
            make!("mq_unlink", libc::SYS_mq_unlink, name.as_ptr())?;
            Ok(fd)
        }
        "kvm_running" => running_guest(),
        "broken_lease" => broken_lease(),
        other => Err(format!("nobody knows the kind {other}")),
    }
}

fn link(fd: i32) -> Result<String, String> {
    if fd < 0 {
        return Ok(String::new());
    }
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|e| e.to_string())?;
    Ok(link.to_string_lossy().into_owned())
}

fn main() {
    zoo::run(|z| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(z.dir(), mode).map_err(|e| e.to_string())?;
        let kind = std::env::var("ZOO_KIND").unwrap_or_else(|_| "perf_event".into());
        let fd = make(z, &kind).unwrap_or_else(|why| z.skip(&why));
        let read = || -> Result<u64, String> {
            let mut value = 0u64;
            // SAFETY: eight bytes of a local.
            let n = unsafe { libc::read(fd, (&raw mut value).cast(), 8) };
            ensure_eq!(ok(n as i64, "read")?, 8, "bytes of the counter");
            Ok(value)
        };
        let counter = if kind == "perf_event" { Some(read()?) } else { None };
        let before = link(fd)?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(link(fd)?, before, "the descriptor");
        if let Some(counter) = counter {
            ensure!(read()? > counter, "the counter stands still");
        }
        Ok(())
    })
}
