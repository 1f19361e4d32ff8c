package android.graphics

class Bitmap(val width: Int, val height: Int, private val colors: IntArray) {
    fun getPixels(pixels: IntArray, offset: Int, stride: Int, x: Int, y: Int, width: Int, height: Int) {
        for (row in 0 until height) for (column in 0 until width) pixels[offset + row * stride + column] = colors[(y + row) * this.width + x + column]
    }

    companion object {
        // nearest neighbour: a stand-in for Android's bilinear filter
        @JvmStatic
        fun createScaledBitmap(source: Bitmap, width: Int, height: Int, filter: Boolean): Bitmap =
            Bitmap(width, height, IntArray(width * height) { source.colors[it / width * source.height / height * source.width + it % width * source.width / width] })

        @JvmStatic
        fun createBitmap(source: Bitmap, x: Int, y: Int, width: Int, height: Int): Bitmap =
            Bitmap(width, height, IntArray(width * height).also { source.getPixels(it, 0, width, x, y, width, height) })
    }
}
