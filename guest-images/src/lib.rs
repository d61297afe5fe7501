//! Guest images: the initramfs writer shared by the developer tasks.
