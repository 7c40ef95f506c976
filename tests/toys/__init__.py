"""What tests share: tiny models, data and folders as strangers have them."""
