//! Requests to an image streamer; never in a file.

use super::declare::messages;

messages! {
    /// Asks the streamer for a file.
    message ImgStreamerRequestEntry "img_streamer_request_entry" {
        required string filename = 1;
    }

    /// The streamer's answer, on restore.
    message ImgStreamerReplyEntry "img_streamer_reply_entry" {
        required bool exists = 1;
    }
}
