//! Instructions of BPF (RFC 9669), as many kinds of them as are needed here.

/// A register.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reg(u8);

/// The result of a call.
pub(super) const R0: Reg = Reg(0);
/// Arguments; a call forgets them.
pub(super) const R1: Reg = Reg(1);
pub(super) const R2: Reg = Reg(2);
pub(super) const R3: Reg = Reg(3);
/// Kept across calls.
pub(super) const R6: Reg = Reg(6);
pub(super) const R7: Reg = Reg(7);
pub(super) const R8: Reg = Reg(8);
pub(super) const R9: Reg = Reg(9);
/// End of the stack of 512 bytes.
pub(super) const STACK: Reg = Reg(10);

/// Functions of the kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Helper {
    ProbeReadKernel = 113,
    SeqWrite = 127,
    DPath = 147,
}

/// How much is loaded.
#[derive(Debug, Clone, Copy)]
pub(super) enum Size {
    Word = 0x00,
    Half = 0x08,
    Double = 0x18,
}

/// A program in the making.
#[derive(Debug, Default)]
pub(super) struct Program {
    pub(super) instructions: Vec<u64>,
    /// Jumps to the end.
    exits: Vec<usize>,
}

impl Program {
    fn push(&mut self, code: u8, to: Reg, from: Reg, offset: i16, value: i32) {
        let word = u64::from(code)
            | u64::from(to.0 | from.0 << 4) << 8
            | u64::from(offset as u16) << 16
            | u64::from(value as u32) << 32;
        self.instructions.push(word);
    }

    /// `to = *(from + offset)`
    pub(super) fn load(&mut self, size: Size, to: Reg, from: Reg, offset: i16) {
        self.push(0x61 | size as u8, to, from, offset, 0);
    }

    /// `*(to + offset) = from`, 64 bits.
    pub(super) fn store(&mut self, to: Reg, offset: i16, from: Reg) {
        self.push(0x7b, to, from, offset, 0);
    }

    /// `*(to + offset) = value`, 64 bits.
    pub(super) fn store_value(&mut self, to: Reg, offset: i16, value: i32) {
        self.push(0x7a, to, Reg(0), offset, value);
    }

    pub(super) fn copy(&mut self, to: Reg, from: Reg) {
        self.push(0xbf, to, from, 0, 0);
    }

    pub(super) fn set(&mut self, to: Reg, value: i32) {
        self.push(0xb7, to, Reg(0), 0, value);
    }

    pub(super) fn add(&mut self, to: Reg, value: i32) {
        self.push(0x07, to, Reg(0), 0, value);
    }

    /// `to` = address of the only value of an array.
    pub(super) fn value_of_map(&mut self, to: Reg, map: i32) {
        const PSEUDO_MAP_VALUE: Reg = Reg(2);
        self.push(0x18, to, PSEUDO_MAP_VALUE, 0, map);
        self.push(0, Reg(0), Reg(0), 0, 0);
    }

    pub(super) fn call(&mut self, helper: Helper) {
        self.push(0x85, Reg(0), Reg(0), 0, helper as i32);
    }

    /// Reads `len` bytes of the kernel's memory at `from + at` to `to + offset`; forgets the arguments. Where there is nothing
    /// to be read it writes zeros.
    ///
    /// For pointers, too: to load one, the kernel looks through the names of all its types, several times, whether it may be
    /// trusted (a millisecond each).
    pub(super) fn read(&mut self, (to, offset): (Reg, i16), len: i32, (from, at): (Reg, i16)) {
        self.copy(R3, from);
        self.add(R3, at.into());
        self.copy(R1, to);
        self.add(R1, offset.into());
        self.set(R2, len);
        self.call(Helper::ProbeReadKernel);
    }

    /// Ends the program if `of` is 0.
    pub(super) fn end_if_null(&mut self, of: Reg) {
        self.exits.push(self.instructions.len());
        self.push(0x15, of, Reg(0), 0, 0);
    }

    /// Skips what `then` adds if `of` is 0.
    pub(super) fn unless_null(&mut self, of: Reg, then: impl FnOnce(&mut Program)) {
        self.skip_if(0x15, of, 0, then);
    }

    /// Skips what `then` adds if `of`, as a signed number, is larger than `most`.
    pub(super) fn unless_more(&mut self, of: Reg, most: i32, then: impl FnOnce(&mut Program)) {
        self.skip_if(0x65, of, most, then);
    }

    /// Skips what `then` adds if `of`, as a signed number, is less than `least`.
    pub(super) fn unless_less(&mut self, of: Reg, least: i32, then: impl FnOnce(&mut Program)) {
        self.skip_if(0xc5, of, least, then);
    }

    fn skip_if(&mut self, code: u8, of: Reg, value: i32, then: impl FnOnce(&mut Program)) {
        let at = self.instructions.len();
        self.push(code, of, Reg(0), 0, value);
        then(self);
        self.jump_here(at);
    }

    fn jump_here(&mut self, at: usize) {
        let distance = (self.instructions.len() - at - 1) as u64;
        self.instructions[at] |= (distance & 0xffff) << 16;
    }

    /// Returns 0, and so do those that were to end the program.
    pub(super) fn end(mut self) -> Vec<u64> {
        for at in std::mem::take(&mut self.exits) {
            self.jump_here(at);
        }
        self.set(R0, 0);
        self.push(0x95, Reg(0), Reg(0), 0, 0);
        self.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_as_the_standard_has_them() {
        let mut program = Program::default();
        program.load(Size::Double, R7, R1, 16);
        program.end_if_null(R7);
        program.unless_more(R0, 7, |p| p.add(R3, -1));
        program.store(STACK, -8, R2);
        program.call(Helper::SeqWrite);
        let words = [
            0x0000_0000_0010_1779,
            0x0000_0000_0004_0715,
            0x0000_0007_0001_0065,
            0xffff_ffff_0000_0307,
            0x0000_0000_fff8_2a7b,
            0x0000_007f_0000_0085,
            0x0000_0000_0000_00b7,
            0x0000_0000_0000_0095,
        ];
        assert_eq!(program.end(), words);
    }
}
