//! What the dumping CPU can do: `cpuinfo.img`.

use super::declare::{enums, messages};

enums! {
    /// CPU vendor.
    enum Vendor "vendor" {
        Unknown "UNKNOWN" = 0;
        Intel "INTEL" = 1;
        Amd "AMD" = 2;
    }

    /// Byte order.
    enum Endianness "endianness" {
        Bigendian "BIGENDIAN" = 0;
        Littleendian "LITTLEENDIAN" = 1;
    }
}

messages! {
    /// CPUs of the dumping machine.
    message CpuinfoEntry "cpuinfo_entry" {
        repeated message CpuinfoX86Entry x86_entry = 1;
        repeated message CpuinfoPpc64Entry ppc64_entry = 2;
        repeated message CpuinfoS390Entry s390_entry = 3;
    }

    /// An x86 CPU, as cpuid tells.
    message CpuinfoX86Entry "cpuinfo_x86_entry" {
        required enum Vendor vendor_id = 1;
        required uint32 cpu_family = 2;
        required uint32 model = 3;
        required uint32 stepping = 4;
        /// 2, as CRIU 4.2 writes.
        required uint32 capability_ver = 5;
        /// The words of the kernel's `x86_capability`.
        repeated uint32 capability = 6;
        optional string model_id = 7;
        /// The features of `XCR0`.
        optional uint64 xfeatures_mask = 8;
        optional uint32 xsave_size = 9;
        optional uint32 xsave_size_max = 10;
    }

    /// A POWER CPU.
    message CpuinfoPpc64Entry "cpuinfo_ppc64_entry" {
        required enum Endianness endian = 1;
        repeated uint64 hwcap = 2;
    }

    /// An s390x CPU.
    message CpuinfoS390Entry "cpuinfo_s390_entry" {
        repeated uint64 hwcap = 2;
    }
}
